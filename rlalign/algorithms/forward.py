"""What forward-process methods share: they noise final samples again and look at the velocity's error there.

x_t = (1 - t) x0 + t ε        u = ε - x0        e_θ(x0; t, ε) = mean_D (v_θ(x_t, t, c) - u)²        ℓ_θ = -w(t) e_θ

uniform   w = 1                t   w = t                t2   w = t²
elbo      w = (1 - t) / t      the only one with which ℓ is a bound of the log-likelihood, D ℓ to be exact
adaptive  ℓ = -mean_D (x̂0 - x0)² / max(sg mean_D |x̂0 - x0|, 1e-5),  x̂0 = x_t - t v_θ     depends on x0 given x_t
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import AdvantageSettings
from rlalign.algorithms.losses import mean_square
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Variant
from rlalign.types import Trajectory

Weighting = Literal["uniform", "t", "t2", "elbo", "adaptive"]
GUARD = 1e-5  # lower bound of the adaptive denominator


class TimeSettings(AdvantageSettings):
    """The keys of forward-process algorithms that say at which times a sample is looked at."""

    times: Literal["grid", "uniform", "logit_normal"] = "grid"
    """grid: the rollout's own levels, in each row's order; else one of T strata of (0, 1) each, shifted."""
    num_times: int = Field(default=4, ge=1)
    """T: times a sample."""
    time_range: tuple[float, float] = (0.0, 1.0)
    """Times outside are not used."""
    time_shift: float = Field(default=1.0, gt=0)
    """s of t -> s t / (1 + (s - 1) t), not for the grid; above 1 it moves times towards the noise."""


@dataclass(frozen=True, slots=True)
class Noised:
    """Samples at one time each, on their way to the noise."""

    x0: Tensor  # [b, *L]
    x: Tensor  # [b, *L]
    t: Tensor  # [b]
    epsilon: Tensor  # [b, *L]

    @property
    def velocity(self) -> Tensor:
        """u = ε - x0 [b, *L]: what the net would have to say."""
        return self.epsilon - self.x0

    @property
    def wide_t(self) -> Tensor:
        """t, to be broadcast against latents."""
        return self.t.reshape(-1, *[1] * (self.x.ndim - 1))


def draw_times(settings: TimeSettings, sample: Trajectory, noise: Noise, by_group: bool = False) -> Tensor:
    """[b, T]; ``by_group``: the rows of a group have their times in common."""
    places, low, high = _places(sample, by_group), *settings.time_range
    if settings.times == "grid":
        grid = sample.schedule.sigma[:-1]
        grid = grid[(grid >= low) & (grid <= high)]
        if settings.num_times > len(grid):
            raise ValueError(
                f"algorithm.num_times: {settings.num_times} is more than the rollout's {len(grid)} levels within "
                f"time_range [{low:g}, {high:g}]"
            )
        keys: list[tuple[int, int, int]] = [(int(a), int(b), int(c)) for a, b, c in places]
        orders = torch.stack([noise.permutation("train/times", key, len(grid)) for key in keys])
        return grid[orders[:, : settings.num_times]].to(sample.final)
    strata = torch.arange(settings.num_times)
    uniform = (strata + noise.uniform("train/times", places, 0, (settings.num_times,))) / settings.num_times
    if settings.times == "logit_normal":
        uniform = torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)).sigmoid()
    shifted = settings.time_shift * uniform / (1 + (settings.time_shift - 1) * uniform)
    return (low + (high - low) * shifted).clamp(1e-3, 1 - 1e-3).to(sample.final)


def noised(sample: Trajectory, t: Tensor, noise: Noise, index: int, by_group: bool = False) -> Noised:
    """The final samples at times t [b]; ``index`` tells draws of a row apart, ``by_group`` gives a group one ε."""
    x0, places = sample.final, _places(sample, by_group)
    epsilon = noise.normal("train/noise", places, index, tuple(x0.shape[1:]), x0.dtype).to(x0)
    times = t.reshape(-1, *[1] * (x0.ndim - 1))
    return Noised(x0, (1 - times) * x0 + times * epsilon, t, epsilon)


def velocity(policy: Policy, sample: Trajectory, at: Noised) -> Tensor:
    """[b, *L] with a graph."""
    return policy.predict_noised(sample, at.x, at.t).velocity


@torch.no_grad()
def fixed_velocity(policy: Policy, name: Variant, sample: Trajectory, at: Noised) -> Tensor:
    """[b, *L] under other weights. To be asked for first: they borrow the parameters of the graph."""
    with policy.using(name):
        return policy.predict_noised(sample, at.x, at.t).velocity


def likelihood(v: Tensor, at: Noised, weighting: Weighting) -> Tensor:
    """ℓ = -w e [b], up to a constant."""
    if weighting == "adaptive":
        missed = at.x - at.wide_t * v - at.x0
        return -mean_square(missed) / missed.detach().abs().flatten(1).mean(1).clamp(min=GUARD)
    return -time_weight(at.t, weighting) * mean_square(v - at.velocity)


def time_weight(t: Tensor, weighting: Weighting) -> Tensor:
    """w(t) [b]; ``adaptive`` is no function of t alone."""
    return {"uniform": torch.ones_like(t), "t": t, "t2": t.square(), "elbo": (1 - t) / t}[weighting]


def group_index(sample: Trajectory) -> Tensor:
    """[b] int64: equal numbers for rows of one group."""
    return sample.address[:, :2].unique(dim=0, return_inverse=True)[1].to(sample.final.device)


def group_mean(values: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """[b]: for each row the mean of its group's values, weighted if weights [b] are given."""
    weights = torch.ones_like(values) if weights is None else weights
    zeros = values.new_zeros(int(index.max()) + 1)
    return (zeros.index_add(0, index, values * weights) / zeros.index_add(0, index, weights))[index]


def mean_over_times(parts: Sequence[Tensor]) -> Tensor:
    """[b]"""
    return torch.stack([*parts]).mean(0)


def _places(sample: Trajectory, by_group: bool) -> Tensor:
    """Addresses [b, 3] of what is drawn: those of the rows, or of the first sample of their group."""
    return sample.address * sample.address.new_tensor([1, 1, 0]) if by_group else sample.address
