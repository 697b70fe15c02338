"""DPOK: the two credits of the penalty against exact gradients, and the two baselines by hand."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import dpok, grpo
from rlalign.algorithms.advantages import loo
from rlalign.algorithms.dpok import Algorithm, Config
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

from .chains import WEIGHT, affine, batch_gradients, law, make_policy, off_by, sample, weight

BETA, GROUP, ROWS, BATCHES = 1.5, 4, 2000, 50


def reward(y: Tensor) -> Tensor:
    """Σ 0.9 y - 1.3 y² / 2 of [b, 1, 1, D]."""
    y = y.flatten(1)
    return (0.9 * y - 1.3 * y.square() / 2).sum(1)


def path_kl(policy: Policy) -> Tensor:
    """Σ_k E KL_k of the stochastic steps, with graph: the means differ by ΔF y + Δf, and y is Gaussian."""
    dim = weight(policy).shape[0]
    mean, covariance = torch.zeros(dim).double(), torch.eye(dim).double()
    total = torch.zeros(()).double()
    reference = make_policy(dim)
    for k in range(policy.settings.num_steps):
        gain, shift, std = affine(policy, k)
        if std > 0:
            base_gain, base_shift, _ = affine(reference, k)
            gain_off, shift_off = gain - base_gain.detach(), shift - base_shift.detach()
            square = (gain_off @ mean + shift_off).square().sum() + (gain_off @ covariance @ gain_off.T).trace()
            total = total + square / (2 * std.square())
        mean = gain @ mean + shift
        covariance = gain @ covariance @ gain.T + std.square() * torch.eye(dim)
    return total


@pytest.fixture(scope="module", params=[("mean", 2), ("sum", 2)], ids=lambda p: p[0])
def policy(request: pytest.FixtureRequest) -> Policy:
    reduction, dim = request.param
    policy = make_policy(dim, logprob_reduction=reduction)
    with torch.no_grad():
        weight(policy).copy_(0.6 * torch.randn(weight(policy).shape, generator=torch.Generator().manual_seed(3)))
    return policy


@pytest.fixture(scope="module")
def truth(policy: Policy) -> Tensor:
    """-∇J of J = E r - β Σ KL, by the reduction of the log-probs."""
    mean, covariance = law(policy)
    value = 0.9 * mean.sum() - 1.3 * (mean.square().sum() + covariance.trace()) / 2 - BETA * path_kl(policy)
    (gradient,) = torch.autograd.grad(-value, policy.parameters[WEIGHT])
    share = 2 if policy.settings.logprob_reduction == "mean" else 1
    return gradient.view_as(weight(policy))[:, :-1] / share


@pytest.fixture(scope="module")
def batches(policy: Policy) -> list[Trajectory]:
    return [sample(policy, ROWS, 1000 + batch) for batch in range(BATCHES)]


def gradients(policy: Policy, credit: str, batches: list[Trajectory], module: ModuleType = dpok) -> Tensor:
    config = {"kl_credit": credit, "kl_weight": BETA, "clip_range": 1.0}
    algorithm = module.Algorithm(module.Config.model_validate(config))

    def loss(trajectory: Trajectory) -> Tensor:
        rewards = reward(trajectory.final).reshape(-1, GROUP)
        advantages = loo(rewards, torch.ones_like(rewards, dtype=torch.bool)).flatten()
        terms = algorithm.losses(policy, trajectory, advantages, Noise(0))
        return torch.stack([term.rows.mean() for term in terms]).sum() * trajectory.num_kept

    return batch_gradients(policy, loss, batches)


def test_to_go_is_the_gradient_of_reward_less_path_divergence(policy: Policy, truth: Tensor, batches: list[Trajectory]):
    assert off_by(gradients(policy, "to_go", batches), truth) < 3


def test_grpo_gives_the_same_credit(policy: Policy, batches: list[Trajectory]):
    for credit in ("to_go", "direct"):
        both = [gradients(policy, credit, batches[:2], module) for module in (dpok, grpo)]
        assert torch.equal(*both)


def test_direct_is_not(policy: Policy, truth: Tensor, batches: list[Trajectory]):
    assert off_by(gradients(policy, "direct", batches), truth) > 6


def test_a_step_answers_for_the_divergence_after_it(policy: Policy):
    trajectory, zero = sample(policy, 5, seed=0), torch.zeros(5).double()
    algorithm = Algorithm(Config(kl_credit="to_go", kl_weight=BETA))
    losses = list(algorithm.losses(policy, trajectory, zero, Noise(0)))
    whole = 1 if policy.settings.logprob_reduction == "sum" else 2
    kls = torch.stack([whole * loss.means["kl"] for loss in losses], 1)
    for slot, loss in enumerate(losses):
        assert torch.allclose(loss.means["kl_to_go"], kls[:, slot + 1 :].sum(1), atol=1e-12)
        assert torch.allclose(loss.means["policy_loss"], BETA * loss.means["kl_to_go"])


def test_without_a_weight_there_is_no_reference(policy: Policy):
    losses = list(
        Algorithm(Config(kl_credit="to_go", kl_weight=0.0)).losses(
            policy, sample(policy, 5, seed=0), torch.ones(5).double(), Noise(0)
        )
    )
    assert all("kl" not in loss.means and "kl_to_go" not in loss.means for loss in losses)


def by_baseline(policy: Policy, baseline: str, batches: list[Trajectory]) -> Tensor:
    """Gradients with the mean reward for V(c), and the regression fitted to batches of its own."""
    config = {"kl_credit": "to_go", "kl_weight": BETA, "clip_range": 1.0, "baseline": baseline}
    algorithm = Algorithm(Config.model_validate(config))
    mean = float(torch.cat([reward(batch.final) for batch in batches]).mean())
    for batch in (sample(policy, ROWS, 5000 + number) for number in range(3)):
        algorithm.fit(algorithm.counted(batch, reward(batch.final) - mean))

    def loss(trajectory: Trajectory) -> Tensor:
        terms = algorithm.losses(policy, trajectory, reward(trajectory.final) - mean, Noise(0))
        return torch.stack([term.rows.mean() for term in terms]).sum() * trajectory.num_kept

    return batch_gradients(policy, loss, batches)


def test_what_a_state_says_of_the_reward_is_no_part_of_the_gradient(
    policy: Policy, truth: Tensor, batches: list[Trajectory]
):
    assert off_by(by_baseline(policy, "state", batches), truth) < 3


def test_what_a_state_says_of_the_reward_is_variance_less():
    """With little noise a state tells most of the reward; E[r | y_k] is quadratic, for which there are features."""
    policy = make_policy(2, noise_level=0.3)
    batches = [sample(policy, ROWS, 1000 + batch) for batch in range(20)]
    state, value = (by_baseline(policy, baseline, batches) for baseline in ("state", "value"))
    assert float(state.var(0).sum() / value.var(0).sum()) < 0.6
    assert off_by(state - value, 0.0) < 3.5
