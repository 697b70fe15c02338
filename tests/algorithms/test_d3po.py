"""D3PO: its losses by hand, and that rewards rise. Whole trajectories: tests/exact/test_implicit_rewards.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms.base import Loss
from rlalign.algorithms.d3po import Algorithm, Config
from rlalign.algorithms.losses import fixed_step
from rlalign.algorithms.pairs import log_ratio, within
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

from .chains import WEIGHT, make_policy, weight
from .preferences import (
    by_fifths,
    gradient,
    reward,
    rewards_while_training,
    rises,
    sample_groups,
)

BETA = 0.7
UNBOUND: dict[str, Any] = {"beta": BETA, "clip_range": None}


def losses(policy: Policy, batch: Trajectory, marks: Tensor, **config: Any) -> list[Loss]:
    return list(Algorithm(Config(**config)).losses(policy, batch, marks, Noise(0)))


def log_ratios(policy: Policy, batch: Trajectory, reduction: Any = "mean") -> Tensor:
    """[b, K]"""
    found: list[Tensor] = []
    for slot in range(batch.num_kept):
        reference = fixed_step(policy, "reference", batch, slot).gaussian
        step = fixed_step(policy, "policy", batch, slot).gaussian
        found.append(log_ratio(step, reference, batch.x_next[:, slot], reduction))
    return torch.stack(found, 1)


@pytest.fixture
def policy() -> Policy:
    """Away from its reference."""
    policy = make_policy(dim=2, num_steps=4)
    with torch.no_grad():
        weight(policy)[:, :, -1] += 0.3
    return policy


@pytest.fixture
def batch(policy: Policy) -> Trajectory:
    return sample_groups(policy, 2, 3, seed=0)


MARKS = torch.tensor([1.0, -1.0, 0.0, 0.0, -1.0, 1.0], dtype=torch.float64)


def test_every_step_is_a_preference_of_its_own(policy: Policy, batch: Trajectory):
    rho = log_ratios(policy, batch)
    for slot, loss in enumerate(losses(policy, batch, MARKS, **UNBOUND)):
        one, two = (BETA * (rho[w, slot] - rho[x, slot]) for w, x in ((0, 1), (5, 4)))
        expected = torch.zeros(6).double()
        expected[[0, 1]], expected[[4, 5]] = -one.sigmoid().log(), -two.sigmoid().log()
        assert torch.allclose(loss.means["policy_loss"], expected)
        assert torch.allclose(loss.means["margin"][[0, 5]], torch.stack([one, two]))
        gains = loss.means["winner_gain"] - loss.means["loser_gain"]
        assert torch.allclose(gains, loss.means["margin"])


def test_a_discount_weighs_early_steps_and_keeps_the_scale(policy: Policy, batch: Trajectory):
    plain, weighted = (losses(policy, batch, MARKS, discount=gamma, **UNBOUND) for gamma in (1.0, 0.5))
    for k, (one, two) in enumerate(zip(plain, weighted, strict=True)):
        assert torch.allclose(two.rows, one.rows * 0.5**k * 3 / 1.75)


def test_a_trajectory_is_one_preference(policy: Policy, batch: Trajectory):
    rho = log_ratios(policy, batch)
    for gamma in (1.0, 0.5):
        found = losses(policy, batch, MARKS, level="trajectory", discount=gamma, **UNBOUND)
        total = BETA * (rho * gamma ** torch.arange(3)).sum(1)
        expected = -torch.stack([total[0] - total[1], total[5] - total[4]]).sigmoid().log()
        assert all(torch.allclose(loss.means["policy_loss"][[0, 5]], expected) for loss in found)


def test_the_ratio_to_the_reference_is_bounded(policy: Policy, batch: Trajectory):
    kept, outside = within(torch.tensor([-1.0, 0.05, 1.0]), 0.1)
    assert kept.exp().tolist() == pytest.approx([0.9, math.exp(0.05), 1.1])
    assert outside.tolist() == [1, 0, 1]
    found = losses(policy, batch, MARKS, beta=BETA, clip_range=1e-6)
    assert all((loss.means["clip_fraction"] == 1).all() for loss in found)
    assert (gradient(policy, found) == 0).all()
    assert (gradient(policy, losses(policy, batch, MARKS, **UNBOUND)) != 0).any()


def test_at_the_reference_winners_are_pulled_and_losers_pushed(batch: Trajectory):
    """h = 0: the gradient is that of -β/2 (ρ_winner - ρ_loser), of both members, by step."""
    policy = make_policy(dim=2, num_steps=4)
    found = losses(policy, batch, MARKS, **UNBOUND)
    assert all(loss.means["policy_loss"].tolist() == pytest.approx(math.log(2) * MARKS.abs()) for loss in found)
    slopes = gradient(policy, found)
    for slot in range(3):
        log_probs = policy.replay(batch, slot).gaussian.log_prob(batch.x_next[:, slot], "mean")
        (expected,) = torch.autograd.grad((-BETA * MARKS * log_probs).sum() / 6 / 3, policy.parameters[WEIGHT])
        slopes -= expected
    assert slopes.abs().max() < 1e-12


def test_settings_that_cannot_be():
    for wrong in ({"clip_range": 1.0}, {"discount": 1.5}, {"beta": 0.0}, {"level": "chain"}):
        with pytest.raises(ValueError):
            Config(**wrong)  # pyright: ignore[reportArgumentType]


# --- sign and monotonicity


@pytest.mark.parametrize("config", [{}, {"pairs": "ranked"}, {"discount": 0.9}, {"level": "trajectory"}], ids=str)
def test_rewards_rise_with_every_step_and_fall_with_flipped_marks(config: dict[str, Any]):
    def seen(sign: float) -> list[float]:
        policy = make_policy(dim=2)
        algorithm = Algorithm(Config(**config))
        return rewards_while_training(
            policy, algorithm, lambda step: sample_groups(policy, 60, 6, step), 6, sign, lr=0.05
        )

    assert rises(seen(1.0))
    assert rises([-value for value in seen(-1.0)])


def test_what_scores_more_becomes_likelier():
    policy = make_policy(dim=2)

    def drawn(step: int) -> Trajectory:
        return sample_groups(policy, 60, 6, step)

    rewards_while_training(policy, Algorithm(Config()), drawn, 6, 1.0, lr=0.05)
    fresh = sample_groups(policy, 200, 2, seed=77)
    gained = log_ratios(policy, fresh).sum(1)
    assert rises(by_fifths(reward(fresh.final), gained))
    assert not rises(by_fifths(reward(fresh.final.flip(0)), gained))
