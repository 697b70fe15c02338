"""A linear-Gaussian chain whose policy gradient is known in closed form: N(0, I) data, D dimensions, residuals a step.

The velocity is the exact one plus an affine residual with a knot at every step, so the policy class is exact.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlalign.mdp.schedule import plain_sigmas
from rlalign.mdp.transition import Gaussian
from rlalign.models import analytic
from rlalign.models.lora import full
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Level, Trajectory

SHIFT = 3.0
WEIGHT = "velocity.residual.weight"


def make_policy(dim: int = 1, num_steps: int = 3, **settings: Any) -> Policy:
    """In float64; knots at the levels of the chain."""
    knots = plain_sigmas(num_steps, SHIFT)[:-1].tolist()
    config = analytic.Config(means=[[0.0] * dim], knots=knots, shift=SHIFT)
    family = analytic.Family.load(config, "", torch.float64, "cpu")
    rollout = RolloutConfig(size=(1, dim), num_steps=num_steps, **settings)
    return Policy(family, rollout, full(family.nets, ["velocity"]), lora=False)


def weight(policy: Policy) -> Tensor:
    """[D, T, D + 1]: of each step's residual the slopes and, last, the constant."""
    parameter = policy.parameters[WEIGHT]
    return parameter.view(parameter.shape[0], -1, parameter.shape[0] + 1)


def sample(policy: Policy, rows: int, seed: int) -> Trajectory:
    """Rows that are their own prompts, from plain torch randomness: addressed noise would take longer than the test."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, *policy.latent_shape)
    schedule = policy.schedule(policy.settings)
    stochastic = torch.ones(rows, schedule.num_steps, dtype=torch.bool)
    stochastic[:, -1] = False
    kept = torch.arange(schedule.num_steps - 1).expand(rows, -1)
    cond = {"log_weights": torch.zeros(rows, 1, dtype=torch.float64)}

    def noise(k: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    chain = policy.roll_out(noise(-1), cond, None, schedule, stochastic, kept, noise, policy.settings)
    address = torch.stack([torch.full((rows,), seed), torch.arange(rows), torch.zeros(rows)], 1).long()
    version = torch.zeros(rows, dtype=torch.int64)
    parts = (chain.x, chain.x_next, chain.log_probs, chain.final)
    return Trajectory(cond, None, schedule, kept, *parts, version, address)


def affine(policy: Policy, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """y_{k+1} = F y_k + f + c z: F [D, D], f [D], c [], with graph; c = 0 in the last step."""
    schedule, dim = policy.schedule(policy.settings), weight(policy).shape[0]
    points = torch.cat([torch.zeros(1, dim), torch.eye(dim)]).double().reshape(-1, *policy.latent_shape)
    at = torch.full((len(points),), k)
    now, nxt = schedule.level(at, points), schedule.level(at + 1, points)
    gaussian = step(policy, points, now, nxt, schedule.time[at], last=k == schedule.num_steps - 1)
    f, *columns = gaussian.mean.flatten(1)
    return torch.stack([column - f for column in columns], 1), f, gaussian.std.flatten()[0]


def step(policy: Policy, x: Tensor, now: Level, nxt: Level, time: Tensor, last: bool) -> Gaussian:
    cond = {"log_weights": torch.zeros(len(x), 1, dtype=torch.float64)}
    prediction = policy.predict(x, time, now, cond, None, 1.0)
    if last:
        return Gaussian(nxt.alpha * prediction.x0 + nxt.sigma * prediction.eps, torch.zeros_like(nxt.sigma))
    return policy.kernel(x, prediction, now, nxt)


def law(policy: Policy) -> tuple[Tensor, Tensor]:
    """Mean [D] and covariance [D, D] of y_N, y_0 ~ N(0, I), with graph."""
    dim = weight(policy).shape[0]
    mean, covariance = torch.zeros(dim).double(), torch.eye(dim).double()
    for k in range(policy.settings.num_steps):
        gain, shift, std = affine(policy, k)
        mean = gain @ mean + shift
        covariance = gain @ covariance @ gain.T + std.square() * torch.eye(dim)
    return mean, covariance


def batch_gradients(policy: Policy, loss: Callable[[Trajectory], Tensor], batches: list[Trajectory]) -> Tensor:
    """[batches, D, K, D + 1]: gradients of independent batches, of the residuals of the stochastic steps."""
    gradients: list[Tensor] = []
    for trajectory in batches:
        loss(trajectory).backward()
        gradient = policy.parameters[WEIGHT].grad
        assert gradient is not None
        gradients.append(gradient.view_as(weight(policy))[:, :-1].clone())
        policy.parameters[WEIGHT].grad = None
    return torch.stack(gradients)


def off_by(gradients: Tensor, truth: Tensor | float) -> float:
    """The largest distance of the mean from the truth, in standard errors of the mean."""
    error = gradients.std(0) / len(gradients) ** 0.5
    return float(((gradients.mean(0) - truth).abs() / error).max())
