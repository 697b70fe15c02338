"""Diffusion-DPO: the margin by hand, what a pair shares, and that rewards rise."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms.base import Loss
from rlalign.algorithms.dpo import Algorithm, Config, levels_above
from rlalign.algorithms.forward import Noised, at_times
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

from .chains import WEIGHT, make_policy, weight
from .preferences import (
    by_fifths,
    data_groups,
    gradient,
    reward,
    rewards_while_training,
    rises,
    scores_of,
)

MARKS = torch.tensor([1.0, -1.0, 0.0, 0.0, -1.0, 1.0], dtype=torch.float64)


@pytest.fixture
def policy() -> Policy:
    """Away from its reference, by a velocity of (0.3, 0.3)."""
    policy = make_policy(dim=2, num_steps=4)
    with torch.no_grad():
        weight(policy)[:, :, -1] += 0.3
    return policy


@pytest.fixture
def batch(policy: Policy) -> Trajectory:
    return data_groups(policy, 2, 3, seed=0)


def losses(policy: Policy, batch: Trajectory, **config: Any) -> list[Loss]:
    return list(Algorithm(Config(**config)).losses(policy, batch, MARKS, Noise(0)))


def places(batch: Trajectory, **config: Any) -> list[Noised]:
    return list(at_times(Config(**config), batch, Noise(0), by_group=True))


def test_the_margin_is_the_papers(policy: Policy, batch: Trajectory):
    """e = mean (v - u)², h = -β/2 [(e_w - e_w^ref) - (e_l - e_l^ref)]."""
    for at, loss in zip(places(batch), losses(policy, batch, beta=5.0), strict=True):
        exact = policy.predict_noised(batch, at.x, at.t).velocity.detach() - 0.3
        better = (exact + 0.3 - at.velocity).square().mean((1, 2, 3)) - (exact - at.velocity).square().mean((1, 2, 3))
        h = torch.stack([-2.5 * (better[0] - better[1]), -2.5 * (better[5] - better[4])])
        assert torch.allclose(loss.means["margin"][[0, 5]], h)
        assert torch.allclose(loss.means["policy_loss"][[0, 5]], -h.sigmoid().log())
        assert torch.equal(loss.means["policy_loss"][[0, 5]], loss.means["policy_loss"][[1, 4]])
        assert loss.means["policy_loss"][[2, 3]].tolist() == [0, 0]
        assert torch.allclose(loss.means["winner_gain"] - loss.means["loser_gain"], loss.means["margin"])


def test_a_pair_shares_its_times_and_its_noise(batch: Trajectory):
    for at in places(batch):
        for group in (slice(0, 3), slice(3, 6)):
            assert (at.t[group] == at.t[group][0]).all()
            assert (at.epsilon[group] == at.epsilon[group][0]).all()
    assert (places(batch)[0].epsilon[0] != places(batch)[0].epsilon[3]).any()


def test_at_the_reference_nothing_is_preferred(batch: Trajectory):
    policy = make_policy(dim=2, num_steps=4)
    for form, expected in {"sigmoid": math.log(2), "cdpo": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * 49)}.items():
        for loss in losses(policy, batch, beta=7.0, loss=form):
            assert loss.means["policy_loss"][[0, 1, 4, 5]].tolist() == pytest.approx([expected] * 4)
            assert (loss.means["accuracy"] == 0).all()


def test_without_the_half_beta_counts_twice(policy: Policy, batch: Trajectory):
    one, two = losses(policy, batch, beta=4.0, dpo_half=False), losses(policy, batch, beta=8.0)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(one, two, strict=True))


def test_beta_goes_by_the_number_of_latent_elements_unless_it_is_given(policy: Policy, batch: Trajectory):
    one, two = losses(policy, batch), losses(policy, batch, beta=2 / 8)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(one, two, strict=True))


def test_weighting_multiplies_the_errors(policy: Policy, batch: Trajectory):
    plain, weighted = (losses(policy, batch, beta=1.0, weighting=name) for name in ("uniform", "t2"))
    for at, one, two in zip(places(batch), plain, weighted, strict=True):
        assert torch.allclose(two.means["margin"], at.t.square() * one.means["margin"])


def test_the_discount_shrinks_the_margin_with_every_noisier_level(policy: Policy, batch: Trajectory):
    """On the grid at step k by γ^k; between two levels as at the cleaner one."""
    grid = batch.schedule.sigma[:-1].double()
    assert levels_above(batch, grid[[2, 0, 3]]).tolist() == [2, 0, 3]
    assert levels_above(batch, (grid[1:] + grid[:-1]) / 2).tolist() == [1, 2, 3]
    plain, discounted = losses(policy, batch, beta=3.0), losses(policy, batch, beta=3.0, discount=0.5)
    for at, one, two in zip(places(batch), plain, discounted, strict=True):
        k = (grid == at.t[:, None]).int().argmax(1)
        assert torch.allclose(two.means["margin"], 0.5**k * one.means["margin"])


def test_rows_outside_pairs_have_no_gradient(policy: Policy, batch: Trajectory):
    without = batch.take(torch.tensor([0, 1, 4, 5]))
    smaller = list(Algorithm(Config()).losses(policy, without, MARKS[[0, 1, 4, 5]], Noise(0)))
    assert torch.allclose(6 * gradient(policy, losses(policy, batch)), 4 * gradient(policy, smaller), rtol=1e-9)


# --- where each loss rests: at the margin that explains how often a sample wins


def off_by(chance: Callable[[Tensor], Tensor], told: dict[str, Any], trained: dict[str, Any]) -> float:
    """The largest mean gradient in standard errors; the first of a pair wins with chance(h), h by ``told``."""
    policy = make_policy(dim=2)
    with torch.no_grad():
        weight(policy).add_(0.2 * torch.sin(torch.arange(weight(policy).numel()).view_as(weight(policy))))
    judge, algorithm = (Algorithm(Config(num_times=1, label_smoothing=Q, **config)) for config in (told, trained))
    first, found = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(PAIRS), list[Tensor]()
    for seed in range(BATCHES):
        batch = data_groups(policy, PAIRS, 2, seed)
        (loss,) = judge.losses(policy, batch, first, Noise(0))
        drawn = torch.rand(PAIRS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        wins = (drawn < chance(loss.means["margin"][::2])).repeat_interleave(2)
        found.append(gradient(policy, algorithm.losses(policy, batch, torch.where(wins, first, -first), Noise(0))))
    stacked = torch.stack(found)
    return float((stacked.mean(0).abs() / (stacked.std(0) / BATCHES**0.5)).max())


PAIRS, BATCHES, Q = 150, 24, 0.1
EXPLAINED: list[tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = [
    ({"loss": "sigmoid", "beta": 4.0}, torch.sigmoid),
    ({"loss": "cdpo", "beta": 1.0}, lambda h: (h.sigmoid() - Q) / (1 - 2 * Q)),
    ({"loss": "ipo", "beta": 0.4}, lambda h: h + 0.5),
    ({"loss": "hinge", "beta": 0.4}, lambda h: torch.full_like(h, 0.5)),
]


@pytest.mark.parametrize(("config", "chance"), EXPLAINED, ids=[str(config["loss"]) for config, _ in EXPLAINED])
def test_each_loss_rests_where_its_margin_explains_the_labels(
    config: dict[str, Any], chance: Callable[[Tensor], Tensor]
):
    assert off_by(chance, config, config) < 4
    assert off_by(lambda h: (h > 0).double(), config, config) > 6  # without chance it asks for more


def test_a_margin_of_another_beta_explains_other_labels():
    assert off_by(torch.sigmoid, {"beta": 4.0}, {"beta": 16.0}) > 6


# --- sign and monotonicity


FORMS: list[dict[str, Any]] = [{"loss": form} for form in ("sigmoid", "ipo", "hinge", "cdpo")]


@pytest.mark.parametrize("config", [*FORMS, {"pairs": "ranked"}, {"times": "uniform"}], ids=str)
def test_rewards_rise_with_every_step_and_fall_with_flipped_marks(config: dict[str, Any]):
    def seen(sign: float) -> list[float]:
        policy = make_policy(dim=2)
        algorithm = Algorithm(Config(**{"num_times": 3, **config}))
        return rewards_while_training(
            policy, algorithm, lambda step: data_groups(policy, 60, 6, step), 6, sign, lr=0.05
        )

    assert rises(seen(1.0))
    assert rises([-value for value in seen(-1.0)])


def test_what_scores_more_fits_better():
    policy = make_policy(dim=2)
    algorithm = Algorithm(Config(num_times=3))
    rewards_while_training(policy, algorithm, lambda step: data_groups(policy, 60, 6, step), 6, 1.0, lr=0.05)
    fresh = data_groups(policy, 400, 1, seed=77)
    gained = torch.zeros(400).double()
    with torch.no_grad():
        for at in places(fresh, num_times=3):
            own = (policy.predict_noised(fresh, at.x, at.t).velocity - at.velocity).square().mean((1, 2, 3))
            with policy.using("reference"):
                base = (policy.predict_noised(fresh, at.x, at.t).velocity - at.velocity).square().mean((1, 2, 3))
            gained += base - own
    assert rises(by_fifths(reward(fresh.final), gained))
    assert not rises(by_fifths(reward(fresh.final.flip(0)), gained))


def test_groups_that_tie_teach_nothing():
    policy = make_policy(dim=2, num_steps=4)
    marks = Algorithm(Config()).advantages(scores_of(torch.ones(2, 3)))
    assert (marks == 0).all()
    found = list(Algorithm(Config()).losses(policy, data_groups(policy, 2, 3, 0), marks.flatten().double(), Noise(0)))
    assert (gradient(policy, found) == 0).all()
    assert policy.parameters[WEIGHT].grad is not None
