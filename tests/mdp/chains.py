"""Small helpers of these tests: levels from numbers, and linear chains propagated exactly, without sampling."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlalign.mdp.prediction import Prediction
from rlalign.mdp.transition import Gaussian
from rlalign.types import Level, Schedule

Step = Callable[[Tensor, Prediction, Level, Level], Gaussian]


def flow_level(sigma: float | Tensor, interior: float = 0.95, dtype: torch.dtype = torch.float64) -> Level:
    sigma = torch.as_tensor(sigma, dtype=dtype)
    return Level(1 - sigma, sigma, torch.tensor(interior, dtype=dtype))


def unit_gaussian(x: Tensor, level: Level) -> Prediction:
    """The exact predictor for data N(0, 1): E[x0 | x] = alpha x/(alpha^2 + sigma^2), E[eps | x] = sigma x/(...)."""
    total = level.alpha.square() + level.sigma.square()
    return Prediction(level.alpha * x / total, level.sigma * x / total)


def propagate(schedule: Schedule, step: Callable[[int], Step]) -> tuple[float, float, float]:
    """Gain F from y_0 to y_N, variance of y_N given y_0, and variance of y_N, for N(0, 1) data; step(k) is a kernel."""
    gain, variance = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    x = torch.ones(1, 1, dtype=torch.float64)
    for k in range(schedule.num_steps):
        now, nxt = schedule.level(k, x), schedule.level(k + 1, x)
        gaussian = step(k)(x, unit_gaussian(x, now), now, nxt)
        factor = gaussian.mean.squeeze()
        gain, variance = factor * gain, factor.square() * variance + gaussian.std.square()
    return gain.item(), variance.item(), (gain.square() + variance).item()
