"""DiffusionNFT: the probabilities, the theorem on a Gaussian, and the old policy's pace."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms.nft import Algorithm, Config, Ramp, branch_losses, optimality
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

from .chains import WEIGHT, make_policy, weight

A = torch.tensor([-7.0, -2.5, 0.0, 1.0, 5.0])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all", [0.0, 0.25, 0.5, 0.6, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.6, 1.0]),
        ("negative_only", [0.0, 0.25, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_optimality_probabilities(mode: Any, expected: list[float]):
    assert optimality(A, 5.0, mode).tolist() == pytest.approx(expected)


def test_branch_losses_by_hand():
    """x0 = 1, ε = 3, t = ½: x_t = 2, u = 2; v = 1, v_old = 0, β = ½: v₊ = ½, v₋ = -½, errors t (u - v±) = ¾ and 1¼."""
    one = torch.ones(1, 1)
    t, arguments = torch.tensor([0.5]), (one, 2 * one)
    adaptive = branch_losses(*arguments, t, one, 0 * one, 0.5, "adaptive")
    uniform = branch_losses(*arguments, t, one, 0 * one, 0.5, "uniform")
    assert [loss.item() for loss in adaptive] == pytest.approx([0.75, 1.25])
    assert [loss.item() for loss in uniform] == pytest.approx([1.5**2, 2.5**2])


def test_adaptive_weights_are_detached_and_bounded():
    x0 = torch.zeros(1, 4)
    v = torch.full((1, 4), 2.0, requires_grad=True)
    positive, _ = branch_losses(x0, x0, torch.tensor([0.5]), v, torch.zeros(1, 4), 1.0, "adaptive")
    (gradient,) = torch.autograd.grad(positive.sum(), v)  # of mean (t v)² / |t v|: 2 t² v / (4 t v)
    assert gradient.tolist() == [pytest.approx([0.25] * 4)]
    at_zero, _ = branch_losses(x0, x0, torch.tensor([0.5]), torch.zeros(1, 4), x0, 1.0, "adaptive")
    assert at_zero.tolist() == [0.0]


@pytest.mark.parametrize("weighting", ["uniform", "adaptive"])
def test_at_the_old_policy_the_gradient_is_proportional_to_how_far_rho_is_from_a_half(weighting: Any):
    generator = torch.Generator().manual_seed(0)
    x0, noise, v_old = (torch.randn(6, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    t, rho = torch.tensor([[0.4] * 6, [0.0, 0.1, 0.5, 0.6, 0.9, 1.0]], dtype=torch.float64)
    v = v_old.clone().requires_grad_()
    positive, negative = branch_losses(x0, 0.6 * x0 + 0.4 * noise, t, v, v_old, 0.7, weighting)
    assert torch.allclose(positive, negative)  # so the value does not depend on the rewards
    (gradient,) = torch.autograd.grad((rho * positive + (1 - rho) * negative).sum() / 0.7, v)
    scale = 1.0 if weighting == "uniform" else 0.4**2 / (0.4 * (v_old - noise + x0)).abs().mean(1, keepdim=True)
    expected = (2 * rho - 1)[:, None] * scale * 2 * (v_old - (noise - x0)) / 3
    assert torch.allclose(gradient, expected, rtol=1e-9)


# --- the theorem: v* = v_old + (2/β) E[ρ (u - v_old) | x_t], for N(0, 1) data and ρ = ½ + slope x0


SLOPE, BETA, BOUND = 0.04, 0.5, 10.0
ROWS, BATCHES = 400, 30


def forward_samples(policy: Policy, batch: int) -> Trajectory:
    """Data itself: only ``final`` and addresses matter to a forward-process method."""
    generator = torch.Generator().manual_seed(batch)
    final = torch.randn(ROWS, *policy.latent_shape, generator=generator, dtype=torch.float64)
    address = torch.stack([torch.full((ROWS,), batch), torch.arange(ROWS), torch.zeros(ROWS)], 1).long()
    empty, cond = final.new_zeros(ROWS, 0), {"log_weights": final.new_zeros(ROWS, 1)}
    steps, version = torch.zeros(ROWS, 0, dtype=torch.int64), torch.zeros(ROWS, dtype=torch.int64)
    schedule = policy.schedule(policy.settings)
    return Trajectory(cond, None, schedule, steps, empty, empty, empty, final, version, address)


def at_the_theorem() -> Policy:
    """Cov(ρ, u | x_t) = slope Cov(x0, u | x_t) = -slope t / (t² + (1 - t)²), a constant of each level."""
    policy = make_policy()
    policy.keep("old")
    sigma = policy.schedule(policy.settings).sigma[:-1].double()
    with torch.no_grad():
        weight(policy)[0, :, -1] = -2 / BETA * SLOPE * sigma / (sigma.square() + (1 - sigma).square())
    return policy


def mean_gradient_in_errors(
    policy: Policy, batches: int = BATCHES, advantages_sign: float = 1.0, **config: Any
) -> float:
    """The largest mean gradient of the loss over independent batches, in standard errors."""
    settings = {"beta": BETA, "adv_clip": BOUND, "kl_weight": 0.0, "weighting": "uniform", "num_times": 3}
    algorithm = Algorithm(Config(**{**settings, **config}))
    gradients: list[Tensor] = []
    for batch in range(batches):
        samples = forward_samples(policy, batch)
        advantages = advantages_sign * 2 * BOUND * SLOPE * samples.final.flatten()
        for loss in algorithm.losses(policy, samples, advantages, Noise(0)):
            loss.rows.mean().backward()
        gradient = policy.parameters[WEIGHT].grad
        assert gradient is not None
        gradients.append(gradient.clone())
        policy.parameters[WEIGHT].grad = None
    stacked = torch.stack(gradients)
    return float((stacked.mean(0).abs() / (stacked.std(0) / batches**0.5)).max())


def test_the_loss_rests_where_the_theorem_says():
    assert mean_gradient_in_errors(at_the_theorem()) < 3


@pytest.mark.parametrize(
    "other",
    [{"advantages_sign": -1.0}, {"adv_mode": "positive_only"}, {"beta": 2 * BETA}, {"kl_weight": 1.0}],
    ids=["sign flipped", "positives only", "another beta", "with a penalty"],
)
def test_and_nowhere_else(other: dict[str, Any]):
    assert mean_gradient_in_errors(at_the_theorem(), batches=8, **other) > 6


# --- around the loss


@pytest.fixture
def policy() -> Policy:
    policy = make_policy(dim=2, num_steps=5)
    policy.keep("old")
    return policy


def test_times_are_the_rollouts_levels_each_row_in_its_own_order(policy: Policy):
    samples = replace(forward_samples(policy, 0))
    grid = samples.schedule.sigma[:-1].double()
    times = Algorithm(Config(num_times=5)).times(samples, Noise(0))
    assert all(set(row.tolist()) == set(grid.tolist()) for row in times[:20])
    assert len({tuple(row.tolist()) for row in times}) > 50
    assert Algorithm(Config()).times(samples, Noise(0)).shape == (ROWS, 4)  # int(0.99 N)
    few = samples.take(torch.tensor([3, 17]))
    assert torch.equal(Algorithm(Config(num_times=5)).times(few, Noise(0)), times[[3, 17]])
    with pytest.raises(ValueError, match="num_times: 6 is more"):
        Algorithm(Config(num_times=6)).times(samples, Noise(0))


def test_metrics_at_the_old_policy_and_away_from_it(policy: Policy):
    samples, advantages = forward_samples(policy, 0).take(torch.arange(4)), torch.tensor([1.0, -1, 0, 2]).double()
    algorithm = Algorithm(Config(kl_weight=0.5, weighting="uniform"))
    for loss in algorithm.losses(policy, samples, advantages, Noise(0)):
        assert (loss.means["old_deviate"] == 0).all()
        assert (loss.means["kl"] == 0).all()
        assert torch.equal(loss.means["positive_loss"], loss.means["negative_loss"])
    with torch.no_grad():
        weight(policy)[:, :, -1] += 0.1
    for loss in algorithm.losses(policy, samples, advantages, Noise(0)):
        assert loss.means["old_deviate"].tolist() == pytest.approx([0.01] * 4)
        assert loss.means["kl"].tolist() == pytest.approx([0.01] * 4)
        penalty = 4 * loss.rows - loss.means["policy_loss"]
        assert penalty.tolist() == pytest.approx([0.005] * 4)


def test_the_old_policy_and_not_the_present_one_is_the_anchor(policy: Policy):
    """With ρ = ½ everywhere the loss pulls v towards v_old, wherever the reference is."""
    with torch.no_grad():
        weight(policy)[:, :, -1] += 0.1
    policy.keep("old")
    with torch.no_grad():
        weight(policy)[:, :, -1] += 0.1
    samples = forward_samples(policy, 0)
    (one, *_) = Algorithm(Config(kl_weight=1.0)).losses(policy, samples, A.new_zeros(ROWS), Noise(0))
    assert torch.allclose(one.means["old_deviate"], torch.tensor(0.1**2).double())
    assert torch.allclose(one.means["kl"], torch.tensor(0.2**2).double())
    for loss in Algorithm(Config(kl_weight=0.0, weighting="uniform")).losses(
        policy, samples, A.new_zeros(ROWS), Noise(0)
    ):
        loss.rows.mean().backward()
    gradient = policy.parameters[WEIGHT].grad
    assert gradient is not None
    assert (gradient.view_as(weight(policy))[:, :, -1].mean(1) > 0).all()


def test_the_penalty_costs_a_pass_only_when_it_counts(policy: Policy, monkeypatch: pytest.MonkeyPatch):
    passes: list[int] = []
    predict = policy.family.predict
    monkeypatch.setattr(policy.family, "predict", lambda *args: passes.append(1) or predict(*args))
    samples = forward_samples(policy, 0).take(torch.arange(4))
    for kl_weight, expected in ((0.0, 2 * 4), (1.0, 3 * 4)):
        passes.clear()
        list(Algorithm(Config(kl_weight=kl_weight)).losses(policy, samples, A.new_zeros(4), Noise(0)))
        assert len(passes) == expected


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (0, [0.0, 0.0, 0.0, 0.0]),
        (1, [0.001, 0.075, 0.1, 0.5]),
        (2, [0.0, 0.0, 0.1875, 0.999]),
        (Ramp(flat=1, rate=0.01, max=0.3), [0.0, 0.3, 0.3, 0.3]),
    ],
)
def test_decay_of_the_old_policy(decay: Any, expected: list[float]):
    assert [Config(old_decay=decay).decay(n) for n in (1, 75, 100, 600)] == pytest.approx(expected)


def test_the_old_policy_follows_after_each_step(policy: Policy):
    with torch.no_grad():
        weight(policy)[:] = 1.0
    assert Algorithm(Config(old_decay=Ramp(rate=0.25, max=0.75))).after_step(policy, updates=1) == {"old_decay": 0.25}
    assert torch.allclose(policy.copies["old"][WEIGHT], torch.full_like(policy.copies["old"][WEIGHT], 0.75))
    Algorithm(Config(old_decay=0)).after_step(policy, updates=2)
    assert torch.equal(policy.copies["old"][WEIGHT], policy.parameters[WEIGHT])
