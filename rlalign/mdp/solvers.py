"""Solvers of the deterministic steps. A solver is a pure function; what it remembers of earlier steps is a value."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlalign.mdp.prediction import Prediction, from_network
from rlalign.mdp.transition import ode
from rlalign.types import Level


@dataclass(frozen=True, slots=True)
class History:
    """The step before: its clean latent and level, and the rows for which both still mean something."""

    x0: Tensor  # [B, *L]
    level: Level
    valid: Tensor  # [] or [B, 1, ...] bool
    before: "History | None" = None  # the step before that one, for solvers of third order


Solver = Callable[[Tensor, Prediction, Level, Level, History | None], tuple[Tensor, History | None]]
"""step(x, prediction, now, nxt, history) -> (x_next, history); history is None at the start of a chain."""


def euler(
    x: Tensor, prediction: Prediction, now: Level, nxt: Level, history: History | None
) -> tuple[Tensor, History | None]:
    """x' = alpha' x0 + sigma' x1: on the flow path x - tau v, on the VP path DDIM with eta = 0."""
    return ode(x, prediction, now, nxt, 0.0).mean, None


def dpmpp_2m(
    x: Tensor, prediction: Prediction, now: Level, nxt: Level, history: History | None
) -> tuple[Tensor, History | None]:
    """DPM-Solver++ (2M), arXiv 2211.01095: x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D.

    That is Euler's step with the clean latent D and the noise that D implies.
    """
    clean = extrapolate(prediction, now, nxt, history)
    x_next, _ = euler(x, from_network("sample", clean, x, now), now, nxt, None)
    return x_next, History(prediction.x0, now, torch.ones_like(now.sigma, dtype=torch.bool))


def dpmpp_3m(
    x: Tensor, prediction: Prediction, now: Level, nxt: Level, history: History | None
) -> tuple[Tensor, History | None]:
    """DPM-Solver++ (3M), arXiv 2211.01095: as 2M, with D from a parabola through the last three clean latents."""
    clean = extrapolate_twice(prediction, now, nxt, history)
    x_next, _ = euler(x, from_network("sample", clean, x, now), now, nxt, None)
    before = None if history is None else replace(history, before=None)
    return x_next, History(prediction.x0, now, torch.ones_like(now.sigma, dtype=torch.bool), before)


SOLVERS: dict[str, Solver] = {"euler": euler, "dpmpp_2m": dpmpp_2m, "dpmpp_3m": dpmpp_3m}


def extrapolate(prediction: Prediction, now: Level, nxt: Level, history: History | None) -> Tensor:
    """D = x0 + (x0 - x0_before)/(2 r) with r = h_before/h and h = lambda' - lambda, lambda = log(alpha/sigma).

    D = x0 without history, at the last step (sigma' = 0, h infinite) and after sigma = 1 (h_before infinite).
    """
    if history is None:
        return prediction.x0
    h = _lambda(nxt) - _lambda(now)
    before = _lambda(now) - _lambda(history.level)
    weight = torch.where(history.valid & (nxt.sigma > 0), h / (2 * before), 0)
    return prediction.x0 + weight * (prediction.x0 - history.x0)


def extrapolate_twice(
    prediction: Prediction, now: Level, nxt: Level, history: History | None, stretch: float = 1.0
) -> Tensor:
    """D = x0 + [(1 - g/H) D1 + ((g - H)/H^2 + 1/2) D2] / g with H = stretch h, g = 1 - exp(-H), and slope_and_bend.

    ``stretch`` is 2 where the step is stochastic (SDE-DPM-Solver++), since its mean decays by exp(-2 h). Second order
    where there is no history of two steps, and at the last step.
    """
    second = extrapolate(prediction, now, nxt, history)
    if history is None or history.before is None:
        return second
    slope, bend = slope_and_bend(prediction, now, nxt, history, history.before)
    reach = stretch * (_lambda(nxt) - _lambda(now))
    gone = -torch.expm1(-reach)
    third = prediction.x0 + ((1 - gone / reach) * slope + ((gone - reach) / reach.square() + 0.5) * bend) / gone
    return torch.where(history.valid & history.before.valid & (nxt.sigma > 0), third, second)


def slope_and_bend(
    prediction: Prediction, now: Level, nxt: Level, last: History, before: History
) -> tuple[Tensor, Tensor]:
    """D1 = d + r/(r + s) (d - e) and D2 = 2 (d - e)/(r + s), d = (x0 - x0_1)/r, e = (x0_1 - x0_2)/s.

    That is h x0' and h^2 x0'' in lambda, of which this step covers h and the last two r h and s h. Without the 2, as in
    public code, the order is not the third.
    """
    h = _lambda(nxt) - _lambda(now)
    r, s = (_lambda(now) - _lambda(last.level)) / h, (_lambda(last.level) - _lambda(before.level)) / h
    d, e = (prediction.x0 - last.x0) / r, (last.x0 - before.x0) / s
    return d + r / (r + s) * (d - e), 2 * (d - e) / (r + s)


def restart(history: History | None, rows: Tensor) -> History | None:
    """Forgets the past of those rows [B, 1, ...] bool: across injected noise it says nothing about the slope."""
    return None if history is None else replace(history, valid=history.valid & ~rows)


def _lambda(level: Level) -> Tensor:
    return (level.alpha / level.sigma).log()
