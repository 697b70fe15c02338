"""PRDP: its loss by hand. That log-ratios come to predict rewards: tests/exact/test_implicit_rewards.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms.prdp import Algorithm, Config, mean_over_pairs, pair_errors, proximal
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

from .chains import WEIGHT, make_policy, weight
from .preferences import at_the_optimum, gradient, reward, sample_groups, scores_of

BETA, SIZE = 0.7, 4
WIDE: dict[str, Any] = {"beta": BETA, "clip_range": 1e9}


def centred(batch: Trajectory) -> Tensor:
    return Algorithm(Config()).advantages(scores_of(reward(batch.final).view(-1, SIZE))).flatten().double()


def losses(policy: Policy, batch: Trajectory, **config: Any):
    return list(Algorithm(Config(**{**WIDE, **config})).losses(policy, batch, centred(batch), Noise(0)))


# --- by hand


def test_a_row_carries_the_mean_over_its_pairs():
    group, implicit = torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 2.0, 4.0, 9.0])
    errors = pair_errors(implicit, torch.tensor([0.0, 3.0, 3.0, 0.0]))  # missed: 1, -1, 1, 9
    assert mean_over_pairs(errors, group).tolist() == [(4 + 0) / 2, (4 + 4) / 2, (0 + 4) / 2, 0]


def test_a_step_is_held_within_the_bound_of_the_sampler():
    rho = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    held = proximal(rho, torch.tensor([0.05, 0.3, -0.3]), 0.1)  # ρ_old = 0.95, 0.7, 1.3
    assert held.tolist() == pytest.approx([1.0, 0.8, 1.2])
    (slope,) = torch.autograd.grad(held.sum(), rho)
    assert slope.tolist() == [1, 0, 0]


def test_advantages_are_centred_rewards():
    rewards = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])
    assert Algorithm(Config()).advantages(scores_of(rewards)).tolist() == [[-1, 1, 0], [0, 0, 0]]


def test_at_the_reference_the_loss_is_the_spread_of_the_rewards():
    policy = make_policy(dim=2)
    batch = sample_groups(policy, 50, SIZE, seed=0)
    for loss in losses(policy, batch):
        spread = 2 * reward(batch.final).view(-1, SIZE).var(1)  # the mean over pairs of (r_i - r_j)²
        assert torch.allclose(loss.means["policy_loss"].view(-1, SIZE).mean(1), spread / BETA**2, rtol=1e-5)
        assert torch.allclose(loss.means["reward_error"], BETA**2 * loss.means["policy_loss"])
        assert (loss.means["ratio/mean"] == 1).all() and (loss.maxima["ratio/max_abs_dev"] == 0).all()


@pytest.mark.parametrize("beta", [0.7, 2.0])
def test_the_runs_reduction_does_not_matter(beta: float):
    found: list[Tensor] = []
    for reduction in ("sum", "mean"):
        policy = at_the_optimum(BETA, logprob_reduction=reduction)
        with torch.no_grad():
            weight(policy)[:, 0, -1] += 0.1
        batch = sample_groups(policy, 10, SIZE, seed=0)
        with torch.no_grad():
            weight(policy)[:, 0, -1] += 0.3  # a second update
        scale = 2 if reduction == "mean" else 1
        found.append(gradient(policy, losses(policy, batch, beta=beta, clip_range=0.1 / scale)))
    assert torch.allclose(found[0], found[1], rtol=1e-9)


def test_the_bound_stops_what_would_go_on_and_lets_back():
    """One pair, of which the second update is beyond the bound on the side that the rewards ask for."""
    policy = make_policy(dim=2)
    batch = sample_groups(policy, 1, 2, seed=0)
    far = torch.tensor([1e3, -1e3], dtype=torch.float64)
    algorithm = Algorithm(Config(beta=1.0, clip_range=1e-3))
    onwards = -gradient(policy, algorithm.losses(policy, batch, far, Noise(0)))
    assert onwards.norm() > 0
    with torch.no_grad():
        policy.parameters[WEIGHT].add_(0.1 * onwards / onwards.norm())
    assert (gradient(policy, algorithm.losses(policy, batch, far, Noise(0))) == 0).all()
    assert (gradient(policy, algorithm.losses(policy, batch, -far, Noise(0))) != 0).any()
    assert all((loss.means["clip_fraction"] > 0).all() for loss in algorithm.losses(policy, batch, far, Noise(0)))
