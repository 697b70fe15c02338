"""Groups on the chain of chains.py, a linear reward, and the policy that is optimal for it."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rlalign.algorithms.base import Algorithm, Loss
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import RewardScores, Scores, Trajectory

from .chains import WEIGHT, affine, law, make_policy, weight

DIRECTION = torch.tensor([1.0, -0.5], dtype=torch.float64)


def reward(y: Tensor) -> Tensor:
    """qᵀ y [b]."""
    return y.flatten(1) @ DIRECTION


def expected_reward(policy: Policy) -> float:
    return float(law(policy)[0].detach() @ DIRECTION)


def scores_of(rewards: Tensor, *more: Tensor) -> Scores:
    """One or more rewards [P, G], all valid, of weight 1."""
    named = {str(i): values.float() for i, values in enumerate((rewards, *more))}
    valid = torch.ones_like(rewards, dtype=torch.bool)
    return Scores({name: RewardScores(values, valid, "train", 1.0) for name, values in named.items()})


def sample_groups(policy: Policy, groups: int, size: int, seed: int, shared: bool = True) -> Trajectory:
    """Rows of a group follow each other; ``shared``: from one y_0. As chains.sample, but for that."""
    generator = torch.Generator().manual_seed(seed)
    rows, schedule = groups * size, policy.schedule(policy.settings)
    stochastic = torch.ones(rows, schedule.num_steps, dtype=torch.bool)
    stochastic[:, -1] = False
    kept = torch.arange(schedule.num_steps - 1).expand(rows, -1)
    cond = {"log_weights": torch.zeros(rows, 1, dtype=torch.float64)}

    def noise(number: int) -> Tensor:
        return torch.randn(number, *policy.latent_shape, generator=generator, dtype=torch.float64)

    start = noise(groups).repeat_interleave(size, 0) if shared else noise(rows)
    chain = policy.roll_out(start, cond, None, schedule, stochastic, kept, lambda _: noise(rows), policy.settings)
    version = torch.zeros(rows, dtype=torch.int64)
    parts = (chain.x, chain.x_next, chain.log_probs, chain.final)
    return Trajectory(cond, None, schedule, kept, *parts, version, addresses(groups, size, seed))


def data_groups(policy: Policy, groups: int, size: int, seed: int) -> Trajectory:
    """N(0, I) data without a trajectory: what forward-process methods need."""
    rows, generator = groups * size, torch.Generator().manual_seed(seed)
    final = torch.randn(rows, *policy.latent_shape, generator=generator, dtype=torch.float64)
    cond, nothing = {"log_weights": final.new_zeros(rows, 1)}, final.new_zeros(rows, 0)
    steps, version = torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    schedule, address = policy.schedule(policy.settings), addresses(groups, size, seed)
    return Trajectory(cond, None, schedule, steps, nothing, nothing, nothing, final, version, address)


def addresses(groups: int, size: int, seed: int) -> Tensor:
    group, row = torch.arange(groups).repeat_interleave(size), torch.arange(size).repeat(groups)
    return torch.stack([torch.full_like(group, seed), group, row], 1)


def at_the_optimum(beta: float, **settings: Any) -> Policy:
    """u_k = (c_k²/β) G_{k+1}ᵀ q (EXACT_TESTS 3.2), as constants of the residual velocity; y_N is in two dimensions."""
    policy = make_policy(dim=2, **settings)
    gain, shifts = torch.eye(2).double(), list[Tensor]()
    for k in reversed(range(3)):
        step_gain, _, std = (part.detach() for part in affine(policy, k))
        shifts.insert(0, std.square() / beta * gain.T @ DIRECTION)
        gain = gain @ step_gain
    with torch.no_grad():
        for k, shift in enumerate(shifts[:2]):
            before = affine(policy, k)[1]
            weight(policy)[:, k, -1] = 1.0  # the mean is linear in the residual: one unit shows the slope
            weight(policy)[:, k, -1] = shift / (affine(policy, k)[1] - before)
    return policy


def sum_of_rows(losses: Iterable[Loss]) -> Tensor:
    return torch.stack([loss.rows.sum() for loss in losses]).sum()


def gradient(policy: Policy, losses: Iterable[Loss]) -> Tensor:
    """Of the mean over rows, as the learner makes it."""
    policy.parameters[WEIGHT].grad = None
    for loss in losses:
        loss.rows.mean().backward()
    found = policy.parameters[WEIGHT].grad
    assert found is not None
    return found.clone()


def regression(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope of y on x and R² = 1 - mean (y - x)² / var y: of the line of slope 1 itself, not of the best one."""
    slope = ((x - x.mean()) * (y - y.mean())).mean() / x.var(correction=0)
    return float(slope), float(1 - (y - x).square().mean() / y.var(correction=0))


def rewards_while_training(
    policy: Policy,
    algorithm: Algorithm,
    drawn: Callable[[int], Trajectory],
    size: int,
    sign: float,
    lr: float,
    steps: int = 6,
) -> list[float]:
    """The exact expected reward before and after every step of plain gradient descent, marks times ``sign``."""
    seen = [expected_reward(policy)]
    for step in range(steps):
        batch = drawn(step)
        marks = sign * algorithm.advantages(scores_of(reward(batch.final).view(-1, size))).flatten().double()
        downhill = gradient(policy, algorithm.losses(policy, batch, marks, Noise(0)))
        with torch.no_grad():
            policy.parameters[WEIGHT].sub_(lr * downhill / downhill.norm())
        seen.append(expected_reward(policy))
    return seen


def rises(values: list[float]) -> bool:
    return all(after > before for before, after in pairwise(values))


def by_fifths(reward: Tensor, values: Tensor) -> list[float]:
    """Means of the values over the fifths of rows of lowest to highest reward."""
    return [float(part.mean()) for part in values[reward.argsort()].chunk(5)]
