"""Terms that several algorithms share: pure functions, one number a row."""

from typing import Literal

import torch
from torch import Tensor

from rlalign.policy import Step

KlForm = Literal["gaussian", "no_tau", "mean_sq", "velocity"]


def ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """ρ = π(y'|y) / π_old(y'|y): exactly 1 where the two log-probs are the same number."""
    return (log_probs - old_log_probs).exp()


def clipped_policy_loss(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """L = max(-A ρ, -A clip(ρ, 1 - low, 1 + high)): PPO, arXiv 1707.06347 (eq. 7); DDPO and Flow-GRPO, per step."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def ratio_means(ratio: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """``ratio/mean``, and which rows lie beyond either end of the clip range, whatever their advantage."""
    above, below = (ratio > 1 + high).float(), (ratio < 1 - low).float()
    return {
        "ratio/mean": ratio.detach(),
        "clip_fraction": above + below,
        "clip_fraction_high": above,
        "clip_fraction_low": below,
    }


def divergence(form: KlForm, step: Step, reference: Step, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """[b] how far a step is from the reference's (docs/kernels.md; c is the whole std of the step, τ = σ - σ').

    gaussian   (μ - μ_ref)² / (2c²)      the Kullback-Leibler divergence itself
    no_tau     τ (μ - μ_ref)² / (2c²)    flow_grpo and verl-omni, whose std lacks √τ: to be used with published weights
    mean_sq    (μ - μ_ref)²              Flow-Factory, x-based
    velocity   (v - v_ref)²              Flow-Factory, v-based; does not depend on the kernel

    The first two are reduced as the log-probs are, so that the weight keeps its meaning; the others are means.
    """
    if form == "velocity":
        return mean_square(step.prediction.velocity - reference.prediction.velocity)
    if form == "mean_sq":
        return mean_square(step.gaussian.mean - reference.gaussian.mean)
    kl = step.gaussian.kl(reference.gaussian, reduction)
    return kl if form == "gaussian" else (step.now.sigma - step.nxt.sigma).flatten() * kl


def mean_square(x: Tensor) -> Tensor:
    """mean_D(x²): [b, *L] -> [b]."""
    return x.square().flatten(1).mean(1)
