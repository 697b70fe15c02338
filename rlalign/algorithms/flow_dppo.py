"""Flow-DPPO: a trust region on the divergence itself in place of a clipped ratio (arXiv 2606.11025).

    D_k = mean_D (μ_θ - μ_old)² / (2 c_k²)
    M_k = 0 where D_k ≥ δ and (A > 0 and ρ_k > 1, or A < 0 and ρ_k < 1), else 1
    L   = mean over samples and kept steps k of  -M_k A ρ_k + β KL_k(π_θ || π_ref)

A noisy ratio says little about how far the policy has gone; D_k says it exactly, and only samples that would push it
on are left out. μ_old is recovered from the noise of the rollout, not stored. D is a mean over latent elements,
whatever the reduction of the log-probs.

Metrics: ``policy_loss``, ``kl`` and the ratio's as in grpo.py, with ``masked_fraction`` = share of samples with M = 0
in place of the clip fractions · ``old_divergence`` = D, what δ is compared with.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import AdvantageSettings, GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith, UpdateSettings
from rlalign.algorithms.losses import DENSITIES, KlForm, divergence, fixed_step, kept_step, ratio, trusted
from rlalign.algorithms.regularise import Penalised
from rlalign.mdp.noise import Noise
from rlalign.mdp.transition import Gaussian
from rlalign.policy import Policy, Step
from rlalign.types import Trajectory


class Config(AdvantageSettings, Penalised, UpdateSettings):
    """The algorithm block with ``name: flow_dppo``."""

    name: Literal["flow_dppo"] = "flow_dppo"
    """This algorithm."""
    threshold: float = Field(default=1e-5, gt=0)
    """δ, of the divergence a latent element; the paper's range is 1e-7 (a slow start) to 1e-5."""
    kl_weight: float = Field(default=0.0, ge=0)
    """β of the penalty towards the reference; above 0 it costs one more pass a step."""
    kl_form: KlForm = "gaussian"
    """gaussian is the true divergence."""
    updates_per_step: int = Field(default=2, ge=1)
    """Optimizer steps of a pass over the batch, each on its own share of whole groups."""


class Algorithm(GroupRelative):
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        compares = config.kl_weight > 0 and config.kl_form in DENSITIES
        self.needs = Needs(trajectory=True, silent_zero=True, densities=compares, exact_states=True)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        for slot in range(sample.num_kept):
            reference = fixed_step(policy, "reference", sample, slot) if self.config.kl_weight > 0 else None
            step = policy.replay(sample, slot)
            old_mean = policy.old_mean(sample, slot, step, noise)
            moved = step.gaussian.kl(Gaussian(old_mean, step.gaussian.std), "mean").detach()
            yield self._loss(policy, sample, slot, advantages, step, moved, reference)

    def _loss(
        self,
        policy: Policy,
        sample: Trajectory,
        slot: int,
        advantages: Tensor,
        step: Step,
        moved: Tensor,
        reference: Step | None,
    ) -> Loss:
        rho = ratio(policy.log_prob(step.gaussian, sample.x_next[:, slot]), sample.log_probs[:, slot])
        mask = trusted(moved, rho.detach(), advantages, self.config.threshold)
        policy_loss = -mask * advantages * rho
        means = {"ratio/mean": rho.detach(), "masked_fraction": 1 - mask, "old_divergence": moved}
        reduction = policy.settings.logprob_reduction
        kl = None if reference is None else divergence(self.config.kl_form, step, reference, reduction)
        return kept_step(sample, policy_loss, rho, means, kl, self.config.kl_weight)


OVERLAY: dict[str, Any] = {
    "rollout": {"kernel": "flow_sde", "noise_level": 0.7, "window": {"size": 2, "range": (0, 2)}, "solver": "euler"},
    "optimizer": {"lr": 5e-4, "eps": 1e-15},
}
"""As for GRPO."""

PRESETS: dict[str, dict[str, Any]] = {
    "flow_dppo_sd35": {
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
        "algorithm": {"name": "flow_dppo", "advantage": "gdpo", "adv_clip": None, "updates_per_step": 2},
        "optimizer": {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": {"decay": 0.9, "every": 8},
        "model": {"lora": {"rank": 32, "alpha": 64}},
    },
}
"""The paper's threshold and advantages on its host recipe, Flow-GRPO on SD3.5. The code does not clamp
advantages."""
