"""EPG, PEPG, PAR: three losses on one likelihood, and the estimates of the divergence."""

from typing import Any

import pytest
import torch

from rlalign.algorithms.epg import Algorithm, Config, kl_estimate, surrogate
from rlalign.algorithms.forward import Ramp
from rlalign.mdp.noise import Noise

from .chains import WEIGHT, weight
from .gaussians import GRID, data, gradient, moved, passes, tilted


@pytest.mark.parametrize(
    ("objective", "value", "slope"),
    [("epg", 2 * 0.3, -2.0), ("pepg", 1.5 * 0.3, -1.5), ("par", 1.5**2 / 2, -1.5)],
)
def test_losses_by_hand(objective: Any, value: float, slope: float):
    """ℓ = -0.3, ℓ_old = -0.8, A = 2: d = ½, A - d = 1.5."""
    own = torch.tensor([-0.3], requires_grad=True)
    loss = surrogate(objective, own, torch.tensor([0.5]), torch.tensor([2.0]))
    assert loss.item() == pytest.approx(value)
    assert torch.autograd.grad(loss.sum(), own)[0].item() == pytest.approx(slope)


@pytest.mark.parametrize("config", [{}, {"importance": False}, {"clip_range": None}, {"estimate": "sample"}])
def test_pepg_and_par_have_the_same_gradient_and_epg_has_not(config: dict[str, Any]):
    policy = moved(tilted(0.0), size=0.05)
    sample, advantages = data(policy, 0), torch.randn(400).double()
    found = {
        objective: gradient(Algorithm(Config(objective=objective, **GRID | config)), policy, sample, advantages)
        for objective in ("epg", "pepg", "par")
    }
    assert torch.allclose(found["pepg"], found["par"])
    assert not torch.allclose(found["pepg"], found["epg"], rtol=1e-3)


def test_par_rests_where_the_likelihood_has_risen_by_the_advantage():
    own = torch.tensor([-0.3], requires_grad=True)
    for objective in ("pepg", "par"):
        loss = surrogate(objective, own, torch.tensor([0.5]), torch.tensor([0.5]))
        assert torch.autograd.grad(loss.sum(), own)[0].item() == 0


def test_importance_weights_are_the_likelihood_ratio():
    policy = moved(tilted(0.0))
    sample, ones = data(policy, 0, rows=50), torch.ones(50).double()
    config: dict[str, Any] = {"clip_range": None, **GRID}
    weighted, plain = (
        list(Algorithm(Config(importance=on, **config)).losses(policy, sample, ones, Noise(0))) for on in (True, False)
    )
    for one, two in zip(weighted, plain, strict=True):
        assert torch.allclose(one.rows, two.rows * one.means["old_gap"].exp())


def test_the_clip_keeps_values_and_takes_gradients():
    policy = moved(tilted(0.0))
    sample, ones = data(policy, 0, rows=50), torch.ones(50).double()
    (clipped, *_) = Algorithm(Config(clip_range=1e-6, **GRID)).losses(policy, sample, ones, Noise(0))
    (free, *_) = Algorithm(Config(clip_range=None, **GRID)).losses(policy, sample, ones, Noise(0))
    assert torch.equal(clipped.rows, free.rows)
    clipped.rows.sum().backward()
    found = policy.parameters[WEIGHT].grad
    policy.parameters[WEIGHT].grad = None
    (free.rows * (free.means["ratio/mean"] <= 1 + 1e-6)).sum().backward()
    assert found is not None
    assert torch.allclose(found, policy.parameters[WEIGHT].grad)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("form", ["k1", "k3"])
def test_estimates_of_the_divergence_have_no_bias(form: Any):
    """N(m, 1) from N(0, 1), whose log ratio is m x - m²/2: KL = m²/2."""
    mean = 0.5
    x = mean + torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimates = kl_estimate(form, mean * x - mean**2 / 2)
    error = float(estimates.std()) / 200_000**0.5
    assert abs(float(estimates.mean()) - mean**2 / 2) < 3 * error
    assert (form == "k3") == bool((estimates >= 0).all())


def test_k2_agrees_to_second_order():
    q = torch.tensor([0.01, -0.01])
    assert kl_estimate("k2", q).tolist() == pytest.approx(kl_estimate("k3", q).tolist(), rel=0.01)


@pytest.mark.parametrize("form", ["girsanov", "k1", "k2", "k3"])
def test_penalties_are_zero_at_the_reference_and_logged(form: Any):
    policy = tilted(0.0)
    for loss in Algorithm(Config(kl_form=form, kl_weight=0.5, **GRID)).losses(
        policy, data(policy, 0, rows=8), torch.zeros(8).double(), Noise(0)
    ):
        assert loss.means["kl"].abs().max() == 0
    moved(policy)
    for loss in Algorithm(Config(kl_form=form, kl_weight=0.5, **GRID)).losses(
        policy, data(policy, 0, rows=8), torch.zeros(8).double(), Noise(0)
    ):
        assert torch.allclose(3 * loss.rows, 0.5 * loss.means["kl"])
        assert loss.means["kl"].abs().max() > 0


@pytest.mark.parametrize(
    ("config", "copies", "sampled", "expected"),
    [
        ({}, ("old",), "old", 6),
        ({"old_decay": Ramp(rate=0, max=0)}, (), "policy", 3),
        ({"old_decay": Ramp(rate=0, max=0), "updates_per_step": 2}, ("start",), "policy", 6),
        ({"kl_weight": 1.0}, ("old",), "old", 9),
    ],
)
def test_old_weights_are_kept_only_where_they_differ(
    config: dict[str, Any], copies: tuple[str, ...], sampled: str, expected: int, monkeypatch: pytest.MonkeyPatch
):
    algorithm = Algorithm(Config(**GRID, **config))
    assert (algorithm.needs.copies, algorithm.sample_with) == (copies, sampled)
    assert passes(tilted(0.0), algorithm, monkeypatch) == expected


def test_the_old_weights_follow():
    policy = tilted(0.0)
    with torch.no_grad():
        weight(policy)[:] = 1.0
    assert Algorithm(Config()).after_step(policy, updates=250) == {"old_decay": 0.25}
    assert (policy.copies["old"][WEIGHT] == 0.75).all()
