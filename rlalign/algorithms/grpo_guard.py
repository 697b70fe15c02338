"""GRPO-Guard: a ratio that is centred and equally wide at every step (arXiv 2510.22319).

    D_k = mean_D (μ_θ - μ_old)² / (2 c_k²)
    ρ̃_k = exp(c_k (log π_θ - log π_old + D_k))                  c_k = s √τ, log-probs as means over elements
    L   = mean over samples and kept steps k of  (1/τ_k) max(-A ρ̃_k, -A clip(ρ̃_k, 1 ± ε)) + β KL_k(π_θ || π_ref)

The plain ratio's mean lies below 1, so that its upper clip rarely acts, and its spread depends on the step. Here the
exponent is mean_D z (μ_θ - μ_old), z the noise of the step: nothing of either is left. Relative to GRPO a step weighs
c_k / τ_k, hence the penalty acts as if β were β τ_k / c_k.

μ_old is recovered from the noise of the rollout, not stored. Metrics as in grpo.py, of ρ̃.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import AdvantageKind, AdvantageSettings, GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith, UpdateSettings
from rlalign.algorithms.losses import (
    KlForm,
    clipped_policy_loss,
    divergence,
    fixed_step,
    guarded_ratio,
    kept_step,
    ratio_means,
    step_length,
)
from rlalign.algorithms.regularise import Penalised
from rlalign.mdp.noise import Noise
from rlalign.mdp.transition import Gaussian
from rlalign.policy import Policy, Step
from rlalign.types import Trajectory


class Config(AdvantageSettings, Penalised, UpdateSettings):
    """The algorithm block with ``name: grpo_guard``."""

    name: Literal["grpo_guard"] = "grpo_guard"
    """This algorithm."""
    advantage: AdvantageKind = "group_std"
    """What is taken off a reward and what it is divided by; the table is in ``rlalign/algorithms/advantages.py``."""
    clip_range: float = Field(default=2e-6, gt=0, le=1)
    """ε of the guarded ratio, which moves c times less than the plain one."""
    guard_div_tau: bool = True
    """False leaves out 1/τ, as Flow-Factory does; on another path than the flow path τ has no meaning."""
    kl_weight: float = Field(default=0.0, ge=0)
    """β of the penalty towards the reference; above 0 it costs one more pass a step."""
    kl_form: KlForm = "gaussian"
    """gaussian is the true divergence."""


class Algorithm(GroupRelative):
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.needs = Needs(trajectory=True, silent_zero=True, densities=True, exact_states=True)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        for slot in range(sample.num_kept):
            reference = fixed_step(policy, "reference", sample, slot) if self.config.kl_weight > 0 else None
            step = policy.replay(sample, slot)
            old = Gaussian(policy.old_mean(sample, slot, step, noise), step.gaussian.std)
            yield self._loss(policy, sample, slot, advantages, step, old, reference)

    def _loss(
        self,
        policy: Policy,
        sample: Trajectory,
        slot: int,
        advantages: Tensor,
        step: Step,
        old: Gaussian,
        reference: Step | None,
    ) -> Loss:
        epsilon, reduction = self.config.clip_range, policy.settings.logprob_reduction
        log_probs = policy.log_prob(step.gaussian, sample.x_next[:, slot])
        moved, std = step.gaussian.kl(old, reduction), step.gaussian.std.flatten()
        rho = guarded_ratio(log_probs, sample.log_probs[:, slot], moved, std)
        policy_loss = clipped_policy_loss(rho, advantages, epsilon, epsilon)
        policy_loss = policy_loss / step_length(step) if self.config.guard_div_tau else policy_loss
        kl = None if reference is None else divergence(self.config.kl_form, step, reference, reduction)
        return kept_step(sample, policy_loss, rho, ratio_means(rho, epsilon, epsilon), kl, self.config.kl_weight)


OVERLAY: dict[str, Any] = {
    "rollout": {"kernel": "flow_sde", "noise_level": 0.7, "window": {"size": 2, "range": (0, 2)}, "solver": "euler"},
    "optimizer": {"lr": 5e-4, "eps": 1e-15},
}
"""As for GRPO."""

PRESETS: dict[str, dict[str, Any]] = {
    "guard_sd35": {
        "rollout": {
            "size": (512, 512),
            "prompts_per_step": 48,
            "samples_per_prompt": 24,
            "num_steps": 10,
            "guidance_scale": 4.5,
            "kernel": "flow_sde",
            "noise_level": 0.7,
            "window": None,
        },
        "algorithm": {"name": "grpo_guard", "advantage": "group_std", "clip_range": 2e-6, "updates_per_step": 2},
        "optimizer": {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": None,
        "model": {"lora": {"rank": 32, "alpha": 64}},
    },
}
"""16 GPUs in the paper. Guidance, steps and LoRA are those of its host recipe, Flow-GRPO on SD3.5."""
