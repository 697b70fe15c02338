"""Decay rules for averaged weights, ``copy <- d * copy + (1 - d) * policy``: pure functions of the step, and the blend.

    constant        d
    power           min(d, (1 + t) / (w + t))                       flow_grpo with w = 10
    ramp            start before `flat`, then min(start + rate (t - flat), top)
                        DiffusionNFT types 0, 1, 2; CRD; AWM; Flow-Factory's linear and piecewise_linear
    cosine          d0 + (d - d0) (1 - cos(pi min(t / T, 1))) / 2   Flow-Factory
    warmup_cosine   linear 0 -> d0 over w steps, then cosine d0 -> d over the T - w left

t counts from 0 at the first update of the copy's source.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def power(step: int, decay: float, warmup: float = 10.0) -> float:
    """min(decay, (1 + t) / (warmup + t)): the first updates count more than they would in the long run."""
    return min(decay, (1 + step) / (warmup + step))


def ramp(step: int, flat: int, rate: float, top: float, start: float = 0.0) -> float:
    """``start`` up to step ``flat``, then rising by ``rate`` a step up to ``top``."""
    return start if step < flat else min(start + rate * (step - flat), top)


def cosine(step: int, start: float, top: float, total: int) -> float:
    """From ``start`` to ``top`` over ``total`` steps along half a cosine."""
    return start + (top - start) * (1 - math.cos(math.pi * min(step / max(total, 1), 1.0))) / 2


def warmup_cosine(step: int, start: float, top: float, warmup: int, total: int) -> float:
    """Linear from 0 to ``start`` over ``warmup`` steps, then half a cosine to ``top`` at step ``total``."""
    return start * step / warmup if step < warmup else cosine(step - warmup, start, top, total - warmup)


@torch.no_grad()
def blend_(copies: Mapping[str, Tensor], weights: Mapping[str, Tensor], decay: float) -> None:
    """copy <- decay * copy + (1 - decay) * weight, in place and in the copy's precision."""
    for name, copy in copies.items():
        copy.lerp_(weights[name].detach().to(copy.dtype), 1 - decay)
