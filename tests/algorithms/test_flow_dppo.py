"""Flow-DPPO: GRPO's gradient where nothing is masked, and who is masked once the policy has gone far."""

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import grpo
from rlalign.algorithms.base import Algorithm, Loss
from rlalign.algorithms.flow_dppo import Algorithm as Dppo
from rlalign.algorithms.flow_dppo import Config
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory
from tests import small

ROWS = torch.arange(12)
ADVANTAGES = torch.linspace(-2, 1.5, len(ROWS))


@pytest.fixture(params=["mean", "sum"])
def chain(request: pytest.FixtureRequest) -> tuple[Policy, Trajectory]:
    sampler, learner = small.workers(Dppo(Config()), small.rollout_config(logprob_reduction=request.param))
    return learner.policy, Trajectory.concat(small.sample(sampler)).take(ROWS)


def moved(policy: Policy) -> Policy:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def losses(algorithm: Algorithm, policy: Policy, trajectory: Trajectory) -> list[Loss]:
    return list(algorithm.losses(policy, trajectory, ADVANTAGES, Noise(0)))


def gradient(policy: Policy, rows: Tensor) -> Tensor:
    gradients = torch.autograd.grad(rows.sum(), list(policy.parameters.values()), retain_graph=True)
    return torch.cat([part.flatten() for part in gradients])


def test_at_a_ratio_of_one_the_gradient_is_that_of_grpo(chain: tuple[Policy, Trajectory]):
    policy, trajectory = chain
    ours = losses(Dppo(Config(threshold=1e-9)), policy, trajectory)
    plain = losses(grpo.Algorithm(grpo.Config()), policy, trajectory)
    for one, two in zip(ours, plain, strict=True):
        assert (one.maxima["ratio/max_abs_dev"] == 0).all()
        assert (one.means["masked_fraction"] == 0).all()
        assert (one.means["old_divergence"] < 1e-9).all()
        assert torch.equal(gradient(policy, one.rows), gradient(policy, two.rows))


def test_the_divergence_is_that_of_the_two_policies_whatever_the_reduction(chain: tuple[Policy, Trajectory]):
    policy, trajectory = chain
    before = [policy.replay(trajectory, slot).gaussian for slot in range(trajectory.num_kept)]
    moved(policy)
    for slot, loss in enumerate(losses(Dppo(Config()), policy, trajectory)):
        after, old = policy.replay(trajectory, slot).gaussian, before[slot]
        expected = ((after.mean - old.mean).square() / (2 * old.std.square())).flatten(1).mean(1)
        assert torch.allclose(loss.means["old_divergence"], expected, rtol=1e-3)


def test_far_samples_that_would_go_on_have_no_gradient_and_no_other(chain: tuple[Policy, Trajectory]):
    policy, trajectory = chain
    (loss, *_) = losses(Dppo(Config(threshold=1e-9)), moved(policy), trajectory)
    rho = loss.means["ratio/mean"]
    outwards = ((rho > 1) & (ADVANTAGES > 0)) | ((rho < 1) & (ADVANTAGES < 0))
    assert outwards.any() and not outwards.all()
    assert torch.equal(loss.means["masked_fraction"] == 1, outwards)
    assert torch.equal(loss.means["policy_loss"], torch.where(outwards, 0, -ADVANTAGES * rho))
    assert (gradient(policy, loss.rows[outwards]) == 0).all()
    assert (gradient(policy, loss.rows[~outwards]) != 0).any()
    (loss, *_) = losses(Dppo(Config(threshold=10.0)), policy, trajectory)
    assert (loss.means["masked_fraction"] == 0).all()


def test_the_penalty_is_beside_the_logged_loss(chain: tuple[Policy, Trajectory]):
    policy, trajectory = chain
    moved(policy)
    (penalised, *_), (plain, *_) = (losses(Dppo(Config(kl_weight=w)), policy, trajectory) for w in (0.5, 0.0))
    assert torch.equal(penalised.means["policy_loss"], plain.means["policy_loss"])
    assert torch.allclose(penalised.rows - plain.rows, 0.5 * penalised.means["kl"] / trajectory.num_kept, atol=1e-6)
