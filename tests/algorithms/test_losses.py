"""The clipped ratio and the divergences, against numbers computed by hand."""

import math

import pytest
import torch

from rlalign.algorithms.losses import KlForm, clipped_policy_loss, divergence, mean_square, ratio, ratio_means
from rlalign.mdp.prediction import from_network
from rlalign.mdp.transition import flow_sde
from rlalign.policy import Step
from rlalign.types import Level


def test_equal_log_probs_give_a_ratio_of_exactly_one():
    log_probs = torch.randn(100) * 1e3
    assert (ratio(log_probs, log_probs.clone()) == 1).all()


@pytest.mark.parametrize(
    ("rho", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.3, 2.0, -2.4, 0.0),  # good and already likelier than the range allows: no more
        (0.7, 2.0, -1.4, -2.0),
        (1.3, -2.0, 2.6, 2.0),
        (0.7, -2.0, 1.8, 0.0),  # bad and already less likely
        (1.3, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_loss_and_its_slope(rho: float, advantage: float, loss: float, slope: float):
    variable = torch.tensor(rho, dtype=torch.float64, requires_grad=True)
    value = clipped_policy_loss(variable, torch.tensor(advantage, dtype=torch.float64), 0.1, 0.2)
    (gradient,) = torch.autograd.grad(value, variable)
    assert value.item() == pytest.approx(loss)
    assert gradient.item() == pytest.approx(slope)


def test_clip_fractions_by_side():
    means = ratio_means(torch.tensor([0.8, 0.95, 1.0, 1.3]), 0.1, 0.2)
    assert means["clip_fraction_low"].tolist() == [1, 0, 0, 0]
    assert means["clip_fraction_high"].tolist() == [0, 0, 0, 1]
    assert means["clip_fraction"].tolist() == [1, 0, 0, 1]


def scalar_step(velocity: float, elements: int = 1) -> Step:
    """The worked example of SPEC_KERNELS 16.2: x = 0.5, sigma 0.8 -> 0.7, Flow-SDE 0.7."""
    now, nxt = (Level(torch.tensor(1 - s).double(), torch.tensor(s).double(), torch.tensor(0.96)) for s in (0.8, 0.7))
    x = torch.full((1, elements), 0.5, dtype=torch.float64)
    prediction = from_network("velocity", torch.full_like(x, velocity), x, now)
    return Step(flow_sde(x, prediction, now, nxt, 0.7), prediction, now, nxt)


@pytest.mark.parametrize(
    ("form", "expected"),
    [("gaussian", 3.954145408e-4), ("no_tau", 3.954145408e-5), ("mean_sq", 1.550025e-4), ("velocity", 0.01)],
)
def test_the_four_divergences(form: KlForm, expected: float):
    assert divergence(form, scalar_step(-0.3), scalar_step(-0.2)).item() == pytest.approx(expected, rel=1e-6)


def test_true_divergences_follow_the_reduction_of_the_log_probs():
    step, reference = scalar_step(-0.3, elements=6), scalar_step(-0.2, elements=6)
    for form in ("gaussian", "no_tau"):
        mean, total = (divergence(form, step, reference, reduction) for reduction in ("mean", "sum"))
        assert total.item() == pytest.approx(6 * mean.item())
    assert torch.equal(divergence("velocity", step, reference, "sum"), divergence("velocity", step, reference, "mean"))


@pytest.mark.parametrize("form", ["gaussian", "no_tau", "mean_sq", "velocity"])
def test_a_divergence_is_zero_and_flat_at_the_reference_and_pulls_back_elsewhere(form: KlForm):
    def value(velocity: float) -> float:
        return divergence(form, scalar_step(velocity), scalar_step(-0.2)).item()

    assert value(-0.2) == 0
    assert value(-0.1) == pytest.approx(value(-0.3), rel=1e-9)
    assert value(0.0) == pytest.approx(4 * value(-0.1), rel=1e-9)


def test_mean_square_is_per_row():
    assert mean_square(torch.tensor([[[1.0, 3.0]], [[0.0, math.sqrt(2)]]])).tolist() == pytest.approx([5.0, 1.0])
