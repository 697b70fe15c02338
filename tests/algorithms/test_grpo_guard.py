"""GRPO-Guard: the old mean that is not stored, and a gradient that is GRPO's times c / τ."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import grpo
from rlalign.algorithms.base import Algorithm, Loss
from rlalign.algorithms.grpo_guard import Algorithm as Guard
from rlalign.algorithms.grpo_guard import Config
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory
from tests import small

ROWS = torch.arange(24)  # all four groups
ADVANTAGES = torch.linspace(-2, 1.5, len(ROWS))


def rolled_out(**settings: Any) -> tuple[Policy, Trajectory]:
    """From addressed noise; every group has its window elsewhere."""
    sampler, learner = small.workers(Guard(Config()), small.rollout_config(**settings))
    whole = Trajectory.concat(small.sample(sampler))
    return learner.policy, whole.take(ROWS)


@pytest.fixture
def chain() -> tuple[Policy, Trajectory]:
    return rolled_out()


def moved(policy: Policy, by: float = 0.05) -> Policy:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter += by * torch.randn(parameter.shape, generator=generator)
    return policy


def losses(algorithm: Algorithm, policy: Policy, trajectory: Trajectory) -> list[Loss]:
    return list(algorithm.losses(policy, trajectory, ADVANTAGES, Noise(0)))


def gradient(policy: Policy, rows: Tensor) -> Tensor:
    gradients = torch.autograd.grad(rows.sum(), list(policy.parameters.values()), retain_graph=True)
    return torch.cat([part.flatten() for part in gradients])


def test_the_old_mean_is_that_of_the_weights_that_sampled(chain: tuple[Policy, Trajectory]):
    policy, trajectory = chain
    assert len(trajectory.steps[:, 0].unique()) > 1
    with torch.no_grad():
        before = [policy.replay(trajectory, slot).gaussian.mean for slot in range(trajectory.num_kept)]
        moved(policy)
        for slot, mean in enumerate(before):
            step = policy.replay(trajectory, slot)
            assert (step.gaussian.mean - mean).abs().max() > 1e-2
            assert torch.allclose(policy.old_mean(trajectory, slot, step, Noise(0)), mean, rtol=0, atol=1e-6)


def test_at_a_ratio_of_one_a_step_weighs_c_over_tau(chain: tuple[Policy, Trajectory]):
    policy, trajectory = chain
    guarded = losses(Guard(Config()), policy, trajectory)
    plain = losses(grpo.Algorithm(grpo.Config()), policy, trajectory)
    for slot, (one, two) in enumerate(zip(guarded, plain, strict=True)):
        assert (one.maxima["ratio/max_abs_dev"] == 0).all()
        step = policy.replay(trajectory, slot)
        weight = (step.gaussian.std / (step.now.sigma - step.nxt.sigma)).flatten().detach()
        expected = gradient(policy, weight * two.rows)
        assert torch.allclose(gradient(policy, one.rows), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_ratio_after_an_update(chain: tuple[Policy, Trajectory]):
    policy, trajectory = chain
    at = [policy.replay(trajectory, slot).gaussian for slot in range(trajectory.num_kept)]
    moved(policy)
    for slot, loss in enumerate(losses(Guard(Config()), policy, trajectory)):
        z = (trajectory.x_next[:, slot] - at[slot].mean) / at[slot].std
        went = policy.replay(trajectory, slot).gaussian.mean - at[slot].mean
        expected = (z * went).flatten(1).mean(1).exp()
        assert torch.allclose(loss.means["ratio/mean"], expected, rtol=0, atol=1e-5)
        outside = (loss.means["ratio/mean"] - 1).abs() > 2e-6
        assert torch.equal(loss.means["clip_fraction"] > 0, outside)
        favourable = outside & ((loss.means["ratio/mean"] > 1) == (ADVANTAGES > 0))
        assert favourable.any()
        assert (gradient(policy, loss.rows[favourable]) == 0).all()


def test_the_penalty_is_not_weighed(chain: tuple[Policy, Trajectory]):
    policy, trajectory = chain
    moved(policy)
    penalised = losses(Guard(Config(kl_weight=0.5)), policy, trajectory)
    plain = losses(Guard(Config()), policy, trajectory)
    for one, two in zip(penalised, plain, strict=True):
        assert torch.equal(one.means["policy_loss"], two.means["policy_loss"])
        assert torch.allclose(one.rows - two.rows, 0.5 * one.means["kl"] / trajectory.num_kept, atol=1e-6)


def test_without_the_length_of_a_step(chain: tuple[Policy, Trajectory]):
    policy, trajectory = chain
    tau = -trajectory.schedule.sigma.diff()
    with_tau, without = (losses(Guard(Config(guard_div_tau=on)), policy, trajectory) for on in (True, False))
    for slot, (one, two) in enumerate(zip(with_tau, without, strict=True)):
        torch.testing.assert_close(one.rows * tau[trajectory.steps[:, slot]], two.rows)
