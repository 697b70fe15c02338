"""GRPO on denoising trajectories: Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818), MixGRPO (2507.21802) ...

    ρ_k = π_θ(y_{k+1} | y_k, c) / π_old(y_{k+1} | y_k, c)
    L   = mean over samples and kept steps k of  w_k max(-A ρ_k, -A clip(ρ_k, 1 ± ε)) + β KL_k(π_θ || π_ref)

The advantage A of a sample is the same for all its steps, unless ``kl_credit`` makes a step answer for the penalties of
later ones. Which steps are stochastic and trained, and by which kernel, is the rollout's business; the three papers
differ in that, in A and in nothing else. TempFlow-GRPO (2508.04324) and Flash-GRPO (2605.15980) add w_k, which is 1
elsewhere (losses.py); the penalty then acts as if β were β / w_k.

Metrics: ``policy_loss`` with w_k, before any penalty · ``kl`` in the form of ``kl_form``, when its weight is positive ·
``ratio/mean`` · ``ratio/max_abs_dev`` = max |ρ - 1|, 0 at a first update on fresh samples · ``clip_fraction`` = share
of ratios outside the clip range, ``clip_fraction_high`` and ``clip_fraction_low`` by side.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from rlalign.algorithms.advantages import AdvantageSettings, GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith, UpdateSettings
from rlalign.algorithms.grpo_presets import PRESETS as PRESETS
from rlalign.algorithms.losses import (
    DENSITIES,
    KlCredit,
    KlForm,
    StepWeight,
    clipped_policy_loss,
    divergence,
    kept_step,
    kl_to_go,
    ratio,
    ratio_means,
    reference_steps,
    step_weights,
)
from rlalign.algorithms.regularise import Penalised
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Step
from rlalign.types import Trajectory

Range = Annotated[float, Field(gt=0, le=1)]


class Config(AdvantageSettings, Penalised, UpdateSettings):
    """The algorithm block with ``name: grpo``."""

    name: Literal["grpo"] = "grpo"
    """This algorithm."""
    clip_range: Range | tuple[Range, Range] = 1e-4
    """ε of the ratio, or [below, above] 1; not transferable between kernels or latent sizes (docs/kernels.md)."""
    kl_weight: float = Field(default=0.0, ge=0)
    """β of the penalty towards the reference; above 0 it costs one more pass a step."""
    kl_form: KlForm = "gaussian"
    """gaussian is the true divergence; weights published for flow_grpo (0.04, 0.01) belong to no_tau."""
    kl_credit: KlCredit = "direct"
    """to_go: A_k = A - β Σ_{j > k} KL_j, whole divergences of later kept steps, for one more pass a step (dpok.py); for
    kl_form gaussian and step_weight none."""
    step_weight: StepWeight = "none"
    """w of a step: tempflow grows with its noise, flash makes all gradients equally long; mean 1 over the steps."""
    zero_std_groups: Literal["drop", "keep"] = "drop"
    """Whether samples of a group that teaches nothing feel the penalty all the same."""

    @model_validator(mode="after")
    def _one_divergence(self) -> "Config":
        if self.kl_credit == "to_go" and (self.kl_form, self.step_weight) != ("gaussian", "none"):
            raise ValueError(
                "kl_credit: to_go counts true divergences that weigh the same in all steps: set kl_form: gaussian and "
                "step_weight: none, or kl_credit: direct"
            )
        return self

    @property
    def clip(self) -> tuple[float, float]:
        return self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range, self.clip_range)


class Algorithm(GroupRelative):
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        free = config.kl_weight == 0
        compares = not free and config.kl_form in DENSITIES
        self.needs = Needs(trajectory=True, silent_zero=True, log_probs_only=free, densities=compares)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        weights = step_weights(self.config.step_weight, policy, sample)
        references = reference_steps(policy, sample, self.config.kl_weight)
        to_go = kl_to_go(policy, sample, references, self.config.kl_credit)
        for slot, reference in enumerate(references):
            credit = advantages if to_go is None else advantages - self.config.kl_weight * to_go[:, slot]
            yield self._loss(policy, sample, slot, credit, weights[:, slot], reference)

    def _loss(
        self,
        policy: Policy,
        sample: Trajectory,
        slot: int,
        advantages: Tensor,
        weights: Tensor,
        reference: Step | None,
    ) -> Loss:
        low, high = self.config.clip
        step = None if reference is None else policy.replay(sample, slot)
        rho = ratio(*policy.log_probs(sample, slot, step))
        policy_loss = weights * clipped_policy_loss(rho, advantages, low, high)
        kl = None
        if step is not None and reference is not None:
            kl = divergence(self.config.kl_form, step, reference, policy.settings.logprob_reduction)
        return kept_step(sample, policy_loss, rho, ratio_means(rho, low, high), kl, self.config.kl_weight)


OVERLAY: dict[str, Any] = {
    "rollout": {"kernel": "flow_sde", "noise_level": 0.7, "window": {"size": 2, "range": (0, 2)}, "solver": "euler"},
    "optimizer": {"lr": 5e-4, "eps": 1e-15},
}
"""Stochastic in the first two steps only: they decide the composition, the deterministic rest removes their noise, and
what is learnt carries over to the deterministic sampler that is evaluated (benchmarks/results: windows and rates)."""
