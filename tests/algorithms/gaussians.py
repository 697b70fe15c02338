"""Forward-process losses on Gaussian data: the velocities are affine, so their optima are known level by level.

N(m, 1) data has the velocity of N(0, 1) data less m t / ((1 - t)² + t²), a constant of each level: with the reward a x0
and KL weight β the tilt of N(0, 1) is N(a / β, 1).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlalign.algorithms.base import Algorithm
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

from .chains import WEIGHT, make_policy, weight

ROWS, BATCHES = 400, 30
GRID: dict[str, Any] = {"times": "grid", "num_times": 3}  # all levels of make_policy's chain


def data(policy: Policy, batch: int, mean: float = 0.0, rows: int = ROWS, samples: int = 1) -> Trajectory:
    """Final samples N(mean, 1), ``samples`` to a group; nothing else matters to a forward-process method."""
    generator = torch.Generator().manual_seed(batch)
    final = mean + torch.randn(rows, *policy.latent_shape, generator=generator, dtype=torch.float64)
    places = torch.arange(rows)
    address = torch.stack([torch.full((rows,), batch), places // samples, places % samples], 1)
    empty, cond = final.new_zeros(rows, 0), {"log_weights": final.new_zeros(rows, 1)}
    steps, version = torch.zeros(rows, 0, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    schedule = policy.schedule(policy.settings)
    return Trajectory(cond, None, schedule, steps, empty, empty, empty, final, version, address)


def tilted(mean: float, **settings: Any) -> Policy:
    """The exact velocity of N(mean, 1) data; the reference is that of N(0, 1)."""
    policy = make_policy(**settings)
    t = policy.schedule(policy.settings).sigma[:-1].double()
    with torch.no_grad():
        weight(policy)[0, :, -1] = -mean * t / (t.square() + (1 - t).square())
    for name in ("old", "start", "teacher"):
        policy.keep(name)
    return policy


def moved(policy: Policy, seed: int = 0, size: float = 0.3) -> Policy:
    """The policy alone somewhere else, its copies where they are."""
    parameter = policy.parameters[WEIGHT]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        parameter += size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return policy


def gradient(algorithm: Algorithm, policy: Policy, sample: Trajectory, advantages: Tensor) -> Tensor:
    """Of the mean over rows, [D, T, D + 1] as ``weight`` gives the parameters."""
    for loss in algorithm.losses(policy, sample, advantages, Noise(0)):
        loss.rows.mean().backward()
    found = policy.parameters[WEIGHT].grad
    assert found is not None
    policy.parameters[WEIGHT].grad = None
    return found.view_as(weight(policy)).clone()


def in_errors(
    algorithm: Algorithm,
    policy: Policy,
    advantages: Callable[[Tensor], Tensor],
    mean: float = 0.0,
    batches: int = BATCHES,
    samples: int = 1,
) -> float:
    """The largest mean gradient over independent batches of N(mean, 1) data, in standard errors."""
    gradients: list[Tensor] = []
    for batch in range(batches):
        sample = data(policy, batch, mean, samples=samples)
        gradients.append(gradient(algorithm, policy, sample, advantages(sample.final.flatten())))
    stacked = torch.stack(gradients)
    return float((stacked.mean(0).abs() / (stacked.std(0) / batches**0.5)).max())


def passes(policy: Policy, algorithm: Algorithm, monkeypatch: Any) -> int:
    """How often the net computes for a loss of one micro-batch."""
    counted: list[int] = []
    predict = policy.family.predict
    monkeypatch.setattr(policy.family, "predict", lambda *args: counted.append(1) or predict(*args))
    sample = data(policy, 0, rows=4, samples=2)
    list(algorithm.losses(policy, sample, torch.tensor([1.0, -1.0, 0.5, -0.5]).double(), Noise(0)))
    return len(counted)
