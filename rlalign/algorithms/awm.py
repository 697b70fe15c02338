"""Advantage weighted matching: PPO with the flow-matching loss for a likelihood (arXiv 2509.25050).

    ρ  = exp(ℓ_θ - ℓ_old)         ℓ = -w(t) mean (v - u)², u = ε - x0, old and new at the same (t, ε)
    L  = mean over samples and times of  max(-A ρ, -A clip(ρ, 1 ± ε))
         + β w_kl(t) mean (v_θ - v_ref)² + β_teacher w_kl(t) mean (v_θ - v_teacher)²
    A  = adv_max / adv_clip clamp(A, ±adv_clip)
    after each step:  θ_teacher <- d θ_teacher + (1 - d) θ

With one update a step ρ = 1 and the gradient is A ∇e: samples are pulled towards or pushed away from. The teacher holds
the policy to its own recent past; without it and with the clip out of reach, as published, training diverges.

Metrics: ``policy_loss`` before the penalties · ``kl`` = w_kl(t) mean (v_θ - v_ref)² and ``teacher``, the same to the
teacher, each when its weight is positive · the ratio's metrics as in grpo.py · ``teacher_decay`` = d of the step.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Copy, Loss, Needs, SampleWith
from rlalign.algorithms.forward import Look, Ramp, RatioSettings, Weighting, look
from rlalign.algorithms.losses import clipped_policy_loss, ratio, ratio_means
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Variant
from rlalign.types import Scores, Trajectory


class Config(RatioSettings):
    """The algorithm block with ``name: awm``."""

    name: Literal["awm"] = "awm"
    """This algorithm."""
    weighting: Weighting = "ghuber"
    """w(t) of the velocity's error; the table is in ``rlalign/algorithms/forward.py``."""
    clip_range: float = Field(default=1.0, gt=0)
    """ε of the ratio; the published 1 is never reached."""
    adv_clip: float = Field(default=5.0, gt=0)  # pyright: ignore[reportIncompatibleVariableOverride]
    """Advantages are clamped to +-adv_clip."""
    adv_max: float | None = Field(default=1.0, gt=0)
    """Clamped advantages are scaled so that adv_clip becomes this; null leaves them as they are."""
    kl_weight: float = Field(default=0.003, ge=0)
    """β of the penalty towards the reference; above 0 it costs one more pass a time."""
    teacher_weight: float = Field(default=1.0, ge=0)
    """β_teacher of the penalty towards the policy's running average; above 0 it costs one more pass a time."""
    teacher_decay: Ramp = Ramp(rate=0.001, max=0.3)
    """d of that average by optimizer step."""

    @property
    def anchors(self) -> dict[Variant, float]:
        """The weights that the policy is held to, and how strongly."""
        weights: dict[Variant, float] = {"reference": self.kl_weight, "teacher": self.teacher_weight}
        return {name: weight for name, weight in weights.items() if weight > 0}


PENALTIES: dict[Variant, str] = {"reference": "kl", "teacher": "teacher"}


class Algorithm(GroupRelative):
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        starts: tuple[Copy, ...] = () if config.single else ("start",)
        teachers: tuple[Copy, ...] = ("teacher",) if config.teacher_weight > 0 else ()
        self.needs = Needs(trajectory=False, copies=starts + teachers, silent_zero=config.teacher_weight == 0)

    def advantages(self, scores: Scores) -> Tensor:
        config = self.config
        scale = 1.0 if config.adv_max is None else config.adv_max / config.adv_clip
        return super().advantages(scores) * scale

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        others: list[Variant] = [self.config.began_with, *self.config.anchors]
        for seen in look(policy, sample, noise, self.config, others):
            yield self._loss(seen, advantages)

    def _loss(self, seen: Look, advantages: Tensor) -> Loss:
        epsilon = self.config.clip_range
        rho = ratio(seen.likelihood, seen.fixed[self.config.began_with])
        rows = clipped_policy_loss(rho, advantages, epsilon, epsilon)
        means = {"policy_loss": rows.detach(), **ratio_means(rho, epsilon, epsilon)}
        for name, weight in self.config.anchors.items():
            rows = rows + weight * seen.distances[name]
            means[PENALTIES[name]] = seen.distances[name].detach()
        return Loss(rows * seen.share, means, {"ratio/max_abs_dev": (rho.detach() - 1).abs()})

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        if "start" in self.needs.copies:
            policy.blend("start", 0.0)
        if "teacher" not in self.needs.copies:
            return {}
        decay = self.config.teacher_decay.at(updates)
        policy.blend("teacher", decay)
        return {"teacher_decay": decay}


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; the paper's SA-Solver without noise is of the same kind."""


def _preset(prompts: int, kl_weight: float, first_time: float) -> dict[str, Any]:
    return {
        "rollout": {
            "num_steps": 14,
            "guidance_scale": 1.0,
            "solver": "dpmpp_2m",
            "size": (512, 512),
            "prompts_per_step": prompts,
            "samples_per_prompt": 24,
        },
        "algorithm": {
            "name": "awm",
            "kl_weight": kl_weight,
            "num_times": 6,
            "time_range": (0.0, first_time),
            "updates_per_step": 1,
        },
        "optimizer": {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": {"decay": 0.99, "every": 1},
        "model": {"lora": {"rank": 32, "alpha": 64}},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "awm_sd35": _preset(72, kl_weight=0.003, first_time=0.999),
    "awm_sd35_pickscore": _preset(24, kl_weight=1e-4, first_time=1.0),
}
"""GenEval and OCR leave the first level, pure noise, out. The authors' LoRA sits on the attention layers alone."""
