"""The clipped ratio and the divergences, against numbers computed by hand."""

import math
from dataclasses import replace

import pytest
import torch

from rlalign.algorithms.losses import (
    KlForm,
    StepWeight,
    clipped_policy_loss,
    divergence,
    guarded_ratio,
    mean_square,
    ratio,
    ratio_means,
    step_weights,
    trusted,
)
from rlalign.mdp.prediction import from_network
from rlalign.mdp.transition import Gaussian, flow_sde
from rlalign.policy import Step
from rlalign.types import Level

from .chains import make_policy, sample


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


def test_the_exponent_of_the_guarded_ratio_is_the_noise_times_the_way_the_mean_went():
    generator = torch.Generator().manual_seed(0)
    old, moved, z = (torch.randn(5, 4, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    std = torch.linspace(0.1, 2, 5).double().reshape(5, 1, 1)
    one, two = Gaussian(old, std), Gaussian(old + 0.01 * moved, std)
    x = one.sample(z)
    rho = guarded_ratio(two.log_prob(x, "mean"), one.log_prob(x, "mean"), two.kl(one, "mean"), std.flatten())
    assert torch.allclose(rho.log(), (z * 0.01 * moved).flatten(1).mean(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("rho", "advantage", "mask"),
    [(1.1, 2.0, 0), (0.9, 2.0, 1), (1.1, -2.0, 1), (0.9, -2.0, 0), (1.0, 2.0, 1), (1.1, 0.0, 1)],
)
def test_far_samples_that_would_go_on_are_left_out(rho: float, advantage: float, mask: float):
    far, near = torch.tensor([0.1]), torch.tensor([0.0999])
    given = torch.tensor([rho]), torch.tensor([advantage]), 0.1
    assert trusted(far, *given).item() == mask
    assert trusted(near, *given).item() == 1


def test_the_weights_of_the_steps_are_those_of_the_papers():
    policy = make_policy(num_steps=10, kernel="flow_sde", noise_level=0.7)
    trajectory = sample(policy, 1, seed=0)
    sigma = trajectory.schedule.sigma.double()
    now, tau = sigma[:-2], sigma[:-2] - sigma[1:-1]
    s = 0.7 * (now / (1 - torch.where(now == 1, sigma[1], now))).sqrt()
    gamma = tau.sqrt() * (1 / s + s * (1 - now) / (2 * now))
    expected: dict[StepWeight, torch.Tensor] = {"tempflow": s * tau.sqrt(), "flash": 1 / gamma}
    for kind, raw in expected.items():
        weights = step_weights(kind, policy, trajectory)
        assert torch.allclose(weights[0], raw / raw.mean(), rtol=1e-6)
    assert (step_weights("none", policy, trajectory) == 1).all()


def test_flash_weights_of_another_kernel():
    """cps: the mean moves by (√(σ'² - c²) (1 - σ) - α' σ) times the velocity."""
    policy = make_policy(num_steps=6, kernel="cps", noise_level=0.8)
    trajectory = sample(policy, 1, seed=0)
    sigma = trajectory.schedule.sigma.double()
    now, nxt = sigma[:-2], sigma[1:-1]
    std = nxt * math.sin(0.4 * math.pi)
    raw = std / ((nxt.square() - std.square()).sqrt() * (1 - now) - (1 - nxt) * now).abs()
    assert torch.allclose(step_weights("flash", policy, trajectory)[0], raw / raw.mean(), rtol=1e-6)


@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("kind", ["tempflow", "flash"])
def test_weights_of_a_compressed_chain_are_those_of_the_whole_one(kind: StepWeight, step: int):
    """Its levels are the same as far as the window goes, it may be at the first 6 of these 10."""
    compressed = {"size": 1, "range": "all", "schedule": "progressive", "hold": 1, "compress": 0.4}
    policy = make_policy(num_steps=10, shift=3.0, window=compressed)
    whole = make_policy(num_steps=10, shift=3.0, window={"size": 1, "range": (0, 6)})
    trajectory = sample(whole, 1, seed=0)
    short = replace(trajectory, schedule=policy.schedule(policy.settings, step), steps=torch.tensor([[step]]))
    assert short.schedule.num_steps < 10
    torch.testing.assert_close(step_weights(kind, policy, short)[0], step_weights(kind, whole, trajectory)[0, [step]])


def test_weights_have_mean_one_over_the_places_of_the_window():
    window = {"size": 1, "range": (1, 4)}
    policy, whole = (make_policy(num_steps=6, window=w) for w in (window, None))
    trajectory = sample(whole, 1, seed=0)  # with all steps, to see the weight of each
    weights = step_weights("tempflow", policy, trajectory)[0]
    assert weights[1:4].mean().item() == pytest.approx(1)
    everywhere = step_weights("tempflow", whole, trajectory)[0]
    assert torch.allclose(weights, everywhere / everywhere[1:4].mean())
