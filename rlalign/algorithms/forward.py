"""What forward-process methods share: they noise final samples again and look at the velocity's error there.

x_t = (1 - t) x0 + t ε        u = ε - x0        e_θ(x0; t, ε) = mean_D (v_θ(x_t, t, c) - u)²        ℓ_θ = -w(t) e_θ

uniform   w = 1                t   w = t                t2   w = t²
elbo      w = (1 - t) / t      the only one with which ℓ is a bound of the log-likelihood, D ℓ to be exact
flow_sde  w = (1 - min(t, 0.99)) / (2 0.7² t)     AWM's "ELBO" of a penalty: 1 / (2 s²) with Flow-SDE's s at noise 0.7
adaptive  ℓ = -mean_D (x̂0 - x0)² / max(sg mean_D |x̂0 - x0|, 1e-5),  x̂0 = x_t - t v_θ     depends on x0 given x_t
huber     ℓ = -t (√(e + 1e-10) - 1e-5)
ghuber    ℓ = -t / p ((e + 1e-10)^p - 1e-10^p),  p = 0.25                   AWM, as huber

A model of discrete times on another path, such as Stable Diffusion 1, is looked at on the flow path too: each training
time has a t = σ / (α + σ) that is as noisy, and α x0 + σ ε is x_t but for the factor α + σ. There e is the error of the
noise, as such models were trained: mean_D (ε_θ - ε)² = (1 - t)² mean_D (v_θ - u)², and so are penalties. The grid is
the rollout's training times, and ``uniform`` draws from all of them alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import AdvantageSettings
from rlalign.algorithms.base import Loss, UpdateSettings
from rlalign.algorithms.losses import mean_square
from rlalign.algorithms.regularise import Penalised, held
from rlalign.ema import ramp
from rlalign.mdp.noise import Noise
from rlalign.models.base import Unusable
from rlalign.policy import Policy, Variant
from rlalign.settings import Settings
from rlalign.types import Trajectory

TimeWeighting = Literal["uniform", "t", "t2", "elbo", "flow_sde"]
Weighting = Literal[TimeWeighting, "adaptive", "huber", "ghuber"]
GUARD = 1e-5  # lower bound of the adaptive denominator
SMOOTH, POWER = 1e-10, 0.25  # of AWM's huber and ghuber


class TimeSettings(AdvantageSettings, UpdateSettings):
    """The keys of forward-process algorithms that say at which times a sample is looked at."""

    times: Literal["grid", "uniform", "logit_normal"] = "grid"
    """grid: the rollout's own levels, in each row's order; else one of T strata of (0, 1) each, shifted."""
    num_times: int = Field(default=4, ge=1)
    """T: times a sample."""
    time_range: tuple[float, float] = (0.0, 1.0)
    """Times outside are not used."""
    time_shift: float = Field(default=1.0, gt=0)
    """s of t -> s t / (1 + (s - 1) t), not for the grid; above 1 it moves times towards the noise."""


class ForwardSettings(TimeSettings, Penalised):
    """The keys of forward-process algorithms that weigh the velocity's error and may hold it to the reference."""

    weighting: Weighting = "uniform"
    """w(t) of the velocity's error; the table is in ``rlalign/algorithms/forward.py``."""
    kl_weight: float = Field(default=0.0, ge=0)
    """β of the penalty w(t) mean (v - v_ref)²; above 0 it costs one more pass a time."""
    kl_weighting: TimeWeighting = "uniform"
    """w(t) of that penalty."""


class RatioSettings(ForwardSettings):
    """With the keys of algorithms that compare ℓ with what it was when the step began."""

    estimate: Literal["time", "sample"] = "time"
    """ℓ of each time on its own, or of a sample, the mean over its times, which costs one more pass a time."""

    @property
    def began_with(self) -> Literal["policy", "start"]:
        """The weights at the beginning of the step: with a single update the policy's own, which costs nothing.

        They are not those that sampled where ``runtime.max_staleness`` is above 0: the ratio corrects for the updates
        of its own step alone.
        """
        return "policy" if self.single else "start"


class Ramp(Settings):
    """d = ``start`` before optimizer step ``flat``, then min(start + rate (n - flat), max)."""

    start: float = Field(default=0.0, ge=0, le=1)
    """d at the start."""
    flat: int = Field(default=0, ge=0)
    """Optimizer steps before it grows."""
    rate: float = Field(default=0.001, ge=0)
    """Growth of d an optimizer step."""
    max: float = Field(default=0.5, ge=0, le=1)
    """Upper bound of d."""

    def at(self, updates: int) -> float:
        """d after so many optimizer steps."""
        return ramp(updates, self.flat, self.rate, self.max, self.start)


@dataclass(frozen=True, slots=True)
class Noised:
    """Samples at one time each, on their way to the noise."""

    x0: Tensor  # [b, *L]
    x: Tensor  # [b, *L]
    t: Tensor  # [b]
    epsilon: Tensor  # [b, *L]
    unit: Tensor | None = None  # [b]   what turns (v - u)² into the error of the noise, for models that predict it
    held: Tensor | None = None  # [b]   what a penalty is multiplied by; None: 1

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
    table = sample.schedule.table
    if settings.times == "grid":
        grid = sample.schedule.flow_grid
        place = grid if table is None else sample.schedule.time[:-1] / len(table)
        grid = grid[(place >= low) & (place <= high)]
        if settings.num_times > len(grid):
            raise Unusable(
                f"algorithm.num_times: {settings.num_times} is more than the rollout's {len(grid)} levels within "
                f"time_range [{low:g}, {high:g}]"
            )
        keys: list[tuple[int, int, int]] = [(int(a), int(b), int(c)) for a, b, c in places]
        orders = torch.stack([noise.permutation("train/times", key, len(grid)) for key in keys])
        return grid[orders[:, : settings.num_times]].to(sample.final)
    strata = torch.arange(settings.num_times)
    uniform = (strata + noise.uniform("train/times", places, 0, (settings.num_times,))) / settings.num_times
    if settings.times == "logit_normal":
        normal = 2**0.5 * torch.erfinv(2 * uniform.double().clamp(1e-6, 1 - 1e-6) - 1)  # its quantiles
        uniform = normal.sigmoid()
    shifted = settings.time_shift * uniform / (1 + (settings.time_shift - 1) * uniform)
    if table is not None:
        index = (len(table) * (low + (high - low) * shifted)).long().clamp(max=len(table) - 1)
        return sample.schedule.flow_times[index].to(sample.final)
    return (low + (high - low) * shifted).clamp(1e-3, 1 - 1e-3).to(sample.final)


def noised(sample: Trajectory, t: Tensor, noise: Noise, index: int, by_group: bool = False) -> Noised:
    """The final samples at times t [b]; ``index`` tells draws of a row apart, ``by_group`` gives a group one ε."""
    x0, places = sample.final, _places(sample, by_group)
    epsilon = noise.normal("train/noise", places, index, tuple(x0.shape[1:]), x0.dtype).to(x0)
    times = t.reshape(-1, *[1] * (x0.ndim - 1))
    unit = None if sample.schedule.table is None else (1 - t).square()
    return Noised(x0, (1 - times) * x0 + times * epsilon, t, epsilon, unit, sample.held)


def at_times(settings: TimeSettings, sample: Trajectory, noise: Noise, by_group: bool = False) -> Iterator[Noised]:
    """The final samples at each of their ``num_times`` times."""
    for index, t in enumerate(draw_times(settings, sample, noise, by_group).unbind(1)):
        yield noised(sample, t, noise, index, by_group)


def velocity(policy: Policy, sample: Trajectory, at: Noised) -> Tensor:
    """[b, *L] with a graph."""
    return policy.predict_noised(sample, at.x, at.t).velocity


@torch.no_grad()
def fixed_velocity(
    policy: Policy, name: Variant, sample: Trajectory, at: Noised, guidance: float | None = None
) -> Tensor:
    """[b, *L] under other weights. To be asked for first: they borrow the parameters of the graph.

    ``reference`` means the policy's anchor, which may have moved (regularise.py). ``guidance`` replaces the rollout's
    scale.
    """
    if guidance is not None and sample.uncond is None:
        raise Unusable("algorithm.kl_guidance is for models with guidance, and this one encodes no negative prompts")
    with policy.using(policy.anchor if name == "reference" else name):
        return policy.predict_noised(sample, at.x, at.t, guidance).velocity


def velocities(
    policy: Policy, sample: Trajectory, at: Noised, others: Iterable[Variant]
) -> tuple[Tensor, dict[Variant, Tensor]]:
    """v_θ with a graph, and without one the velocities under other weights; ``policy`` among them is v_θ itself."""
    fixed: dict[Variant, Tensor] = {
        name: fixed_velocity(policy, name, sample, at) for name in others if name != "policy"
    }
    v = velocity(policy, sample, at)
    fixed["policy"] = v.detach()
    return v, fixed


def error(v: Tensor, at: Noised, weighting: Weighting) -> Tensor:
    """-ℓ [b]: how wrong the velocity is, weighted as ℓ is."""
    return -likelihood(v, at, weighting)


def likelihood(v: Tensor, at: Noised, weighting: Weighting) -> Tensor:
    """ℓ = -w e [b], up to a constant."""
    if weighting == "adaptive":
        missed = at.x - at.wide_t * v - at.x0
        return -mean_square(missed) / missed.detach().abs().flatten(1).mean(1).clamp(min=GUARD)
    e = mean_square(v - at.velocity)
    if at.unit is not None:
        if weighting in ("elbo", "flow_sde"):
            raise Unusable(f"algorithm.weighting {weighting} is for flow-matching models; set it to uniform")
        e = at.unit * e
    if weighting == "huber":
        return -at.t * ((e + SMOOTH).sqrt() - SMOOTH**0.5)
    if weighting == "ghuber":
        return -at.t / POWER * ((e + SMOOTH) ** POWER - SMOOTH**POWER)
    return -time_weight(at.t, weighting) * e


def time_weight(t: Tensor, weighting: TimeWeighting) -> Tensor:
    """w(t) [b]."""
    if weighting == "flow_sde":
        return (1 - t.clamp(max=0.99)) / (2 * 0.7**2 * t)
    return {"uniform": torch.ones_like(t), "t": t, "t2": t.square(), "elbo": (1 - t) / t}[weighting]


def distance(v: Tensor, fixed: Tensor, at: Noised, weighting: TimeWeighting) -> Tensor:
    """w(t) mean_D (v - v_fixed)² [b], of the noise for models that predict it."""
    found = time_weight(at.t, weighting) * mean_square(v - fixed)
    return found if at.unit is None else at.unit * found


def penalty(v: Tensor, fixed: Tensor, at: Noised, weighting: TimeWeighting) -> Tensor:
    """w(t) mean_D (v - v_fixed)² [b], what holds a velocity to the reference's, in the samples that are to be held."""
    return held(distance(v, fixed, at, weighting), at.held)


@dataclass(frozen=True, slots=True)
class Look:
    """What one of the times says of each sample."""

    share: float  # of the sample's times
    likelihood: Tensor  # [b] ℓ_θ, with graph
    fixed: dict[Variant, Tensor]  # [b] ℓ under other weights
    distances: dict[Variant, Tensor]  # [b] from them, with graph; from the reference in the samples that are to be held
    held: Tensor | None = None  # [b]   what a penalty is multiplied by; None: 1


def look(
    policy: Policy, sample: Trajectory, noise: Noise, settings: RatioSettings, others: Sequence[Variant]
) -> Iterator[Look]:
    """A look at each time, with ℓ as ``settings.estimate`` says.

    Of a sample, ℓ has the value of the mean over all times, from a first pass without graph, and at each time that
    time's gradient: a loss L(ℓ), taken a share a time, then has the gradient L'(mean) times the mean of ∇ℓ, while no
    more than one graph is held.
    """
    if settings.estimate == "time":
        for at in at_times(settings, sample, noise):
            yield _look(*velocities(policy, sample, at, others), at, settings)
        return
    with torch.no_grad():
        seen = [(at, *velocities(policy, sample, at, others)) for at in at_times(settings, sample, noise)]
        parts = [_look(v, fixed, at, settings) for at, v, fixed in seen]
        whole = mean_over_times([part.likelihood for part in parts])
        fixed_whole: dict[Variant, Tensor] = {
            name: mean_over_times([part.fixed[name] for part in parts]) for name in parts[0].fixed
        }
    for at, _, fixed in seen:
        part = _look(velocity(policy, sample, at), fixed, at, settings)
        slope = part.likelihood - part.likelihood.detach()
        yield Look(part.share, whole + slope, fixed_whole, part.distances, part.held)


def _look(v: Tensor, fixed: dict[Variant, Tensor], at: Noised, settings: RatioSettings) -> Look:
    def own(velocity: Tensor) -> Tensor:
        return likelihood(velocity, at, settings.weighting)

    likelihoods: dict[Variant, Tensor] = {name: own(other) for name, other in fixed.items()}
    distances: dict[Variant, Tensor] = {
        name: (penalty if name == "reference" else distance)(v, other, at, settings.kl_weighting)
        for name, other in fixed.items()
    }
    return Look(1 / settings.num_times, own(v), likelihoods, distances, at.held)


def regression(
    policy: Policy, sample: Trajectory, weights: Tensor, noise: Noise, settings: ForwardSettings
) -> Iterator[Loss]:
    """W w(t) mean (v_θ - u)² + β w_kl(t) mean (v_θ - v_ref)² at each time, row weights W [b] of either sign."""
    others: list[Variant] = ["reference"] if settings.kl_weight > 0 else []
    for at in at_times(settings, sample, noise):
        v, fixed = velocities(policy, sample, at, others)
        e = error(v, at, settings.weighting)
        rows = weights * e
        means = {"policy_loss": rows.detach(), "error": e.detach()}
        if others:
            kl = penalty(v, fixed["reference"], at, settings.kl_weighting)
            rows, means["kl"] = rows + settings.kl_weight * kl, kl.detach()
        yield Loss(rows / settings.num_times, means)


def beyond(ratio: Tensor, favour: Tensor, low: float, high: float) -> Tensor:
    """[b] bool: already further than the clip range allows in the direction that ``favour`` [b] pushes."""
    return torch.where(favour > 0, ratio > 1 + high, ratio < 1 - low)


def group_index(sample: Trajectory) -> Tensor:
    """[b] int64: the first row of the same group, hence equal numbers for rows of one group."""
    places = sample.address[:, :2].to(sample.final.device)
    return (places[:, None] == places).all(2).int().argmax(1)


def group_mean(values: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """[b]: for each row the mean of its group's values, weighted if weights [b] are given."""
    shares = (index[:, None] == index).to(values)
    shares = shares if weights is None else shares * weights
    return shares @ values / shares.sum(1)


def mean_over_times(parts: Sequence[Tensor]) -> Tensor:
    """[b]"""
    return torch.stack([*parts]).mean(0)


def _places(sample: Trajectory, by_group: bool) -> Tensor:
    """Addresses [b, 3] of what is drawn: those of the rows, or of the first sample of their group."""
    return sample.address * sample.address.new_tensor([1, 1, 0]) if by_group else sample.address
