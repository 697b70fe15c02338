"""GRPO on denoising trajectories: Flow-GRPO (arXiv 2505.05470), DanceGRPO (2505.07818), MixGRPO (2507.21802).

    ρ_k = π_θ(y_{k+1} | y_k, c) / π_old(y_{k+1} | y_k, c)
    L   = mean over samples and kept steps k of  max(-A ρ_k, -A clip(ρ_k, 1 ± ε)) + β KL_k(π_θ || π_ref)

The advantage A of a sample is the same for all its steps. Which steps are stochastic and trained, and by which kernel,
is the rollout's business; the three papers differ in that, in A and in nothing else.

Metrics: ``policy_loss`` before any penalty · ``kl`` in the form of ``kl_form``, when its weight is positive ·
``ratio/mean`` · ``ratio/max_abs_dev`` = max |ρ - 1|, 0 at a first update on fresh samples · ``clip_fraction`` = share
of ratios outside the clip range, ``clip_fraction_high`` and ``clip_fraction_low`` by side.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import AdvantageSettings, group_relative
from rlalign.algorithms.base import Loss, Needs, SampleWith
from rlalign.algorithms.losses import KlForm, clipped_policy_loss, divergence, ratio, ratio_means
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Step
from rlalign.types import Scores, State, Trajectory

Range = Annotated[float, Field(gt=0, le=1)]


class Config(AdvantageSettings):
    """The algorithm block with ``name: grpo``."""

    name: Literal["grpo"] = "grpo"
    """This algorithm."""
    clip_range: Range | tuple[Range, Range] = 1e-4
    """ε of the ratio, or [below, above] 1; not transferable between kernels or latent sizes (docs/kernels.md)."""
    kl_weight: float = Field(default=0.0, ge=0)
    """β of the penalty towards the reference; above 0 it costs one more pass a step."""
    kl_form: KlForm = "gaussian"
    """gaussian is the true divergence; weights published for flow_grpo (0.04, 0.01) belong to no_tau."""
    zero_std_groups: Literal["drop", "keep"] = "drop"
    """keep: rows with advantage 0 still feel the penalty; drop: they do not count at all."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer steps a batch, each on its own share of whole groups."""

    @property
    def clip(self) -> tuple[float, float]:
        return self.clip_range if isinstance(self.clip_range, tuple) else (self.clip_range, self.clip_range)


class Algorithm:
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs = Needs(trajectory=True, silent_zero=config.kl_weight == 0 or config.zero_std_groups == "drop")

    def advantages(self, scores: Scores) -> Tensor:
        return group_relative(scores, self.config)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        for slot in range(sample.num_kept):
            reference = self._reference(policy, sample, slot)  # first: it borrows the parameters that the graph holds
            yield self._loss(policy, sample, slot, advantages, reference)

    def _loss(self, policy: Policy, sample: Trajectory, slot: int, advantages: Tensor, reference: Step | None) -> Loss:
        low, high = self.config.clip
        step = policy.replay(sample, slot)
        rho = ratio(policy.log_prob(step.gaussian, sample.x_next[:, slot]), sample.log_probs[:, slot])
        policy_loss = clipped_policy_loss(rho, advantages, low, high)
        rows, means = policy_loss, {"policy_loss": policy_loss.detach(), **ratio_means(rho, low, high)}
        if reference is not None:
            kl = divergence(self.config.kl_form, step, reference, policy.settings.logprob_reduction)
            counts = advantages != 0 if self.config.zero_std_groups == "drop" else torch.ones_like(kl)
            rows, means["kl"] = rows + self.config.kl_weight * kl * counts, kl.detach()
        return Loss(rows / sample.num_kept, means, {"ratio/max_abs_dev": (rho.detach() - 1).abs()})

    def _reference(self, policy: Policy, sample: Trajectory, slot: int) -> Step | None:
        if self.config.kl_weight == 0:
            return None
        with torch.no_grad(), policy.using("reference"):
            return policy.replay(sample, slot)

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> State:
        return State()

    def load_state_dict(self, state: State) -> None:
        pass


OVERLAY: dict[str, Any] = {
    "rollout": {"kernel": "flow_sde", "noise_level": 0.7, "window": {"size": 2, "range": (0, 2)}, "solver": "euler"},
    "optimizer": {"lr": 5e-4, "eps": 1e-15},
}
"""Stochastic in the first two steps only: they decide the composition, the deterministic rest removes their noise, and
what is learnt carries over to the deterministic sampler that is evaluated (benchmarks/results: windows and rates)."""


def _preset(
    images: tuple[int, int],
    rollout: dict[str, Any],
    algorithm: dict[str, Any],
    lr: float = 3e-4,
    lora: tuple[int, int] | None = (32, 64),
    ema: bool = False,
) -> dict[str, Any]:
    """A published recipe as blocks of a run file: images = prompts x samples of a step, lora = rank and alpha."""
    prompts, samples = images
    return {
        "rollout": {"size": (512, 512), "prompts_per_step": prompts, "samples_per_prompt": samples, **rollout},
        "algorithm": {"name": "grpo", "updates_per_step": 2, **algorithm},
        "optimizer": {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": {"decay": 0.9, "every": 8} if ema else None,
        "model": {"lora": {"rank": lora[0], "alpha": lora[1]} if lora else None},
    }


def _steps(number: int, guidance: float, noise_level: float, **other: Any) -> dict[str, Any]:
    return {"num_steps": number, "guidance_scale": guidance, "noise_level": noise_level, "kernel": "flow_sde", **other}


_OLD: dict[str, Any] = {"last_step": "sde_untrained", "uncond_grad": False}  # flow_grpo's first pipeline
_CPS: dict[str, Any] = {"kernel": "cps", "cps_logprob": "unscaled", "window": {"size": 3, "range": (0, 5)}}
_TWO: dict[str, Any] = {"window": {"size": 2, "range": (0, 5)}}
_DANCE: dict[str, Any] = {"size": (720, 720), "shift": 3.0, "init_noise": "shared", "time_to_net": "int"}
_KL: dict[str, Any] = {"kl_weight": 0.04, "kl_form": "no_tau"}  # for GenEval and OCR; PickScore 0.01, CLIP score 0.02
_UNBIASED: dict[str, Any] = {"std_estimator": "unbiased", "zero_std_groups": "keep"}
_GROUP: dict[str, Any] = {"advantage": "group_std", "std_delta": 1e-8, **_UNBIASED}

PRESETS: dict[str, dict[str, Any]] = {
    "flow_grpo_sd35": _preset((48, 24), _steps(10, 4.5, 0.7, **_OLD), _KL, ema=True),
    "flow_grpo_sd35_1gpu": _preset((8, 8), _steps(10, 4.5, 0.7, **_OLD), _KL, ema=True),
    "flow_grpo_fast_sd35": _preset((48, 24), _steps(10, 1.0, 0.8, **_CPS), {"clip_range": 1e-5}, ema=True),
    "flow_grpo_flux": _preset((48, 24), _steps(6, 3.5, 0.9, **_OLD), {}, ema=True),
    "flow_grpo_kontext": _preset((48, 21), _steps(6, 2.5, 0.9, **_OLD), {}, ema=True),
    "flow_grpo_qwen": _preset((32, 16), _steps(10, 4.0, 1.2, uncond_grad=False, **_TWO), {}, lora=(64, 128)),
    "verl_sd35": _preset((8, 8), _steps(10, 1.0, 0.8, **_CPS), {"clip_range": 1e-5, **_UNBIASED}, lr=1e-4),
    "verl_qwen": _preset((32, 16), _steps(10, 4.0, 1.2, **_TWO), {"clip_range": 1e-5, **_UNBIASED}, lora=(64, 128)),
    "dance_flux": _preset(
        (16, 12),
        _steps(16, 3.5, 0.3, **_DANCE | {"kernel": "dance_sde", "train_fraction": 0.6}),
        {"updates_per_step": 3, **_GROUP},
        lr=1e-5,
        lora=None,
    ),
    "dance_flux_lora": _preset(
        (8, 12),
        _steps(12, 3.5, 0.3, **_DANCE | {"kernel": "dance_sde", "train_fraction": 0.6}),
        {"updates_per_step": 1, **_GROUP},
        lora=(128, 256),
    ),
    "mix_flux": _preset(
        (32, 12),
        _steps(25, 3.5, 0.7, **_DANCE | {"window": {"size": 4, "range": (0, 24)}}),
        {"updates_per_step": 4, **_GROUP | {"advantage": "advantage_aggr"}},
        lr=1e-5,
        lora=None,
    ),
}
"""Published settings. Where a paper counts per GPU, prompts are its GPUs and updates its group
size over its accumulation. DanceGRPO decodes the last step's x0, which is our Euler step to σ = 0. MixGRPO's window is
drawn, its strategy ``random``. eps is the published one, which can swallow gradients of mean log-probs."""
