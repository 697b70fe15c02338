"""Centred reward distillation: the policy's own reward is fitted to the given one, up to a constant a prompt (arXiv
2603.14128).

    r̂  = -(e_θ - e_teacher),  e = mean (v - u)²            what the change since ``teacher`` says a sample is worth
    R  = clip(A / (2 M) + ½, 0, 1)                          M = adv_clip
    L  = M / β mean over samples and times of  (β (r̂ - sg Σ p r̂) - (R - Σ p R))²       sums over the sample's group
         or the cross-entropy of the logits β (r̂ - ...) with the targets σ(R - ...)
    p  = 1 / G, or two losses averaged, one with p = softmax(R / T) and one with softmax(-R / T)
    +    β_KL w_kl(t) mean (v_θ - v_ref)², with reward_adaptive_kl times m + R (1 - m), m = 1e-4 / β_KL

Centring takes out the prompt's unknown constant, log Z. Three sets of weights: the policy, ``teacher``, which r̂ is
measured from, and ``old``, which samples; were they the same, the ratio would collapse.

Metrics: ``policy_loss`` before the penalty · ``implicit_reward`` = r̂, 0 where θ = teacher · ``kl``, the penalty before
β_KL, when that is positive · ``old_decay`` and ``teacher_decay`` of the step.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith
from rlalign.algorithms.forward import (
    GUARD,
    ForwardSettings,
    Noised,
    Ramp,
    at_times,
    error,
    fixed_velocity,
    group_index,
    group_mean,
    penalty,
    velocities,
)
from rlalign.algorithms.losses import mean_square
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

Form = Literal["square", "cross_entropy"]
FLOOR = 1e-4  # of the reward-adaptive penalty's weight


class Config(ForwardSettings):
    """The algorithm block with ``name: crd``."""

    name: Literal["crd"] = "crd"
    """This algorithm."""
    adv_clip: float = Field(default=5.0, gt=0)  # pyright: ignore[reportIncompatibleVariableOverride]
    """M: advantages are clamped to +-adv_clip, and R is 0 and 1 there."""
    beta: float = Field(default=1.0, gt=0)
    """β: the smaller, the further the policy has to go for the same reward."""
    form: Form = "square"
    """How the centred rewards are compared."""
    self_normalized: bool = True
    """Each error e is divided by its own mean absolute error, detached; then ``weighting`` does not count."""
    temperature: float | None = Field(default=None, gt=0)
    """T of the two softmax centres; null: the plain mean of the group."""
    kl_weight: float = Field(default=0.1, ge=0)
    """β_KL of the penalty towards the reference."""
    reward_adaptive_kl: bool = True
    """Good samples are held to the reference, bad ones hardly."""
    kl_guidance: float | None = Field(default=None, gt=1)
    """Guidance scale of the reference in the penalty, whatever that of the rollouts; null: the same."""
    teacher_decay: Ramp = Ramp(start=0.25, rate=0.005, max=0.999)
    """d by optimizer step of the weights that r̂ is measured from."""
    old_decay: Ramp = Ramp(flat=75, rate=0.0075, max=0.999)
    """d by optimizer step of the weights that sample."""


def self_normalized_error(v: Tensor, at: Noised) -> Tensor:
    """mean_D (v - u)² / max(sg mean_D |v - u|, 1e-5) [b]; of ε in place of v for models of the noise (forward.py)."""
    missed = v - at.velocity
    if at.unit is not None:
        missed = at.unit.sqrt().reshape(-1, *[1] * (missed.ndim - 1)) * missed
    return mean_square(missed) / missed.detach().abs().flatten(1).mean(1).clamp(min=GUARD)


def centred_loss(
    implicit: Tensor, targets: Tensor, group: Tensor, beta: float, form: Form, temperature: float | None
) -> Tensor:
    """[b] mean over the centres of (β (r̂ - sg Σ p r̂) - (R - Σ p R))², or the cross-entropy; all [b]."""
    scales = (0.0,) if temperature is None else (1 / temperature, -1 / temperature)
    losses: list[Tensor] = []
    for weights in ((scale * targets).exp() for scale in scales):
        own = beta * (implicit - group_mean(implicit.detach(), group, weights))
        given = targets - group_mean(targets, group, weights)
        cross = binary_cross_entropy_with_logits(own, given.sigmoid(), reduction="none")
        losses.append((own - given).square() if form == "square" else cross)
    return torch.stack(losses).mean(0)


def reward_adaptive(targets: Tensor, kl_weight: float) -> Tensor:
    """m + R (1 - m) [b], m = min(1e-4 / β_KL, 1): β_KL times it goes from 1e-4 for the worst to β_KL for the best.

    With a β_KL below 1e-4, which a target may come to, it is β_KL for all.
    """
    floor = min(FLOOR / kl_weight, 1.0)
    return floor + targets * (1 - floor)


class Algorithm(GroupRelative):
    sample_with: SampleWith = "old"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        guided = config.kl_guidance is not None and config.kl_weight > 0
        self.needs = Needs(trajectory=False, copies=("old", "teacher"), whole_groups=True, uncond=guided)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        config, group = self.config, group_index(sample)
        bound = config.adv_clip
        targets = (advantages.clamp(-bound, bound) / (2 * bound) + 0.5).clamp(0, 1)
        for at in at_times(config, sample, noise):
            reference = self._reference(policy, sample, at)
            v, fixed = velocities(policy, sample, at, ["teacher"])
            implicit = self._error(fixed["teacher"], at) - self._error(v, at)
            loss = centred_loss(implicit, targets, group, config.beta, config.form, config.temperature)
            rows = bound / config.beta * loss
            means = {"policy_loss": rows.detach(), "implicit_reward": implicit.detach()}
            if reference is not None:
                kl = penalty(v, reference, at, config.kl_weighting)
                kl = kl * reward_adaptive(targets, config.kl_weight) if config.reward_adaptive_kl else kl
                rows, means["kl"] = rows + config.kl_weight * kl, kl.detach()
            yield Loss(rows / config.num_times, means)

    def _error(self, v: Tensor, at: Noised) -> Tensor:
        return self_normalized_error(v, at) if self.config.self_normalized else error(v, at, self.config.weighting)

    def _reference(self, policy: Policy, sample: Trajectory, at: Noised) -> Tensor | None:
        if self.config.kl_weight == 0:
            return None
        return fixed_velocity(policy, "reference", sample, at, self.config.kl_guidance)

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        decays = {"old": self.config.old_decay.at(updates), "teacher": self.config.teacher_decay.at(updates)}
        for name, decay in decays.items():
            policy.blend(name, decay)
        return {f"{name}_decay": decay for name, decay in decays.items()}


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""

PRESETS: dict[str, dict[str, Any]] = {
    "crd_sd35": {
        "rollout": {
            "num_steps": 10,
            "guidance_scale": 1.0,
            "solver": "dpmpp_2m",
            "size": (512, 512),
            "prompts_per_step": 48,
            "samples_per_prompt": 24,
        },
        "algorithm": {"name": "crd", "kl_guidance": 4.5, "num_times": 9, "updates_per_step": 2},
        "optimizer": {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "model": {"lora": {"rank": 32, "alpha": 64}},
    },
}
"""The paper's OCR settings; β, its penalty's weight and the decays are the defaults. Rollouts are unguided, the
reference is guided."""
