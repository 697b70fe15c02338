"""DiffusionNFT: reinforcement on the forward process, from final samples alone (arXiv 2509.16117).

    ρ  = clip(A / (2 M) + ½, 0, 1)                                 how probably the sample is a good one; M = adv_clip
    x_t = (1 - t) x0 + t ε                                         t from the rollout's own grid, permuted per sample
    v₊ = (1 - β) v_old + β v_θ        v₋ = (1 + β) v_old - β v_θ
    L  = mean over samples and times of
         M [ρ ‖x_t - t v₊ - x0‖²/w₊ + (1 - ρ) ‖x_t - t v₋ - x0‖²/w₋] / β + β_KL ‖v_θ - v_ref‖²
    after each step:  θ_old <- d θ_old + (1 - d) θ

Samples come from θ_old through an ODE; no log-prob is needed, so sampler and learner may differ in their numerics.
With weighting ``uniform`` the unique minimum is v_old + (2/β) E[ρ (u - v_old) | x_t], u = ε - x0 (the paper's theorem).

Metrics: ``policy_loss`` before the penalty; where θ = θ_old it says nothing of the rewards, only its gradient does ·
``positive_loss`` and ``negative_loss``, the two errors before ρ, M and β · ``old_deviate`` = mean (v_θ - v_old)², 0
where θ = θ_old · ``kl`` = mean (v_θ - v_ref)², when its weight is positive · ``old_decay`` = d of the step.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import AdvantageSettings, GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith, UpdateSettings
from rlalign.algorithms.forward import Noised, Ramp, fixed_velocity, noised, penalty, velocity
from rlalign.algorithms.losses import mean_square
from rlalign.algorithms.regularise import Penalised
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

AdvantageMode = Literal["all", "positive_only", "negative_only", "one_only", "binary"]
Weighting = Literal["adaptive", "uniform"]  # of the clean latent's error, not of the velocity's


DECAYS = {0: Ramp(rate=0.0, max=0.0), 1: Ramp(rate=0.001, max=0.5), 2: Ramp(flat=75, rate=0.0075, max=0.999)}


class Config(AdvantageSettings, Penalised, UpdateSettings):
    """The algorithm block with ``name: nft``."""

    name: Literal["nft"] = "nft"
    """This algorithm."""
    adv_clip: float = Field(default=5.0, gt=0)  # pyright: ignore[reportIncompatibleVariableOverride]
    """M: advantages are clamped to +-adv_clip, and ρ is 0 and 1 there."""
    beta: float = Field(default=1.0, gt=0)
    """β, the guidance strength between the two implicit policies; the smaller, the longer the step."""
    kl_weight: float = Field(default=1e-4, ge=0)
    """β_KL of the velocity's distance to the reference; above 0 it costs one more pass a time."""
    weighting: Weighting = "adaptive"
    """adaptive: w = mean |x̂ - x0|, detached; uniform: w = t², which makes it the mean square error of the velocity."""
    adv_mode: AdvantageMode = "all"
    """Which side of the advantages counts; positive_only collapses (the paper's ablation)."""
    num_times: int | None = Field(default=None, ge=1)
    """Times a sample, drawn from the rollout's grid; null: all but one, int(0.99 N)."""
    old_decay: Literal[0, 1, 2] | Ramp = 1
    """d by optimizer step n; 0: always 0, 1: min(0.001 n, 0.5), 2: 0 up to n = 75, then min(0.0075 (n - 75), 0.999)."""

    def decay(self, updates: int) -> float:
        """d after so many optimizer steps."""
        rule = self.old_decay if isinstance(self.old_decay, Ramp) else DECAYS[self.old_decay]
        return rule.at(updates)


def optimality(advantages: Tensor, bound: float, mode: AdvantageMode = "all") -> Tensor:
    """ρ = clip(clamp(A, ±M) / (2 M) + ½, 0, 1); the mode changes A after the clamp."""
    clamped = advantages.clamp(-bound, bound)
    chosen = {
        "all": clamped,
        "positive_only": clamped.clamp(min=0),
        "negative_only": clamped.clamp(max=0),
        "one_only": (clamped > 0).to(clamped),
        "binary": clamped.sign(),
    }[mode]
    return (chosen / (2 * bound) + 0.5).clamp(0, 1)


def branch_losses(
    x0: Tensor, x_t: Tensor, t: Tensor, v: Tensor, v_old: Tensor, beta: float, weighting: Weighting
) -> tuple[Tensor, Tensor]:
    """[b] errors of the clean latents that v₊ and v₋ imply, ‖x_t - t v± - x0‖²/w±; t [b]."""
    positive, negative = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
    times = t.reshape(-1, *[1] * (x0.ndim - 1))

    def error(velocity: Tensor) -> Tensor:
        missed = x_t - times * velocity - x0
        weight = t.square() if weighting == "uniform" else missed.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
        return mean_square(missed) / weight

    return error(positive), error(negative)


class Algorithm(GroupRelative):
    needs = Needs(trajectory=False, copies=("old",))
    sample_with: SampleWith = "old"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        rho = optimality(advantages, self.config.adv_clip, self.config.adv_mode)
        times = self.times(sample, noise)
        for index, t in enumerate(times.unbind(1)):
            loss = self._loss(policy, sample, rho, noised(sample, t, noise, index))
            yield Loss(loss.rows / times.shape[1], loss.means)

    def times(self, sample: Trajectory, noise: Noise) -> Tensor:
        """[b, T] levels of the rollout's grid, in each row's own order."""
        grid = sample.schedule.flow_grid
        number = self.config.num_times or max(1, int(0.99 * len(grid)))
        if number > len(grid):
            raise ValueError(f"algorithm.num_times: {number} is more than the rollout's {len(grid)} levels")
        places = [(int(step), int(group), int(row)) for step, group, row in sample.address]
        orders = [noise.permutation("train/times", place, len(grid)) for place in places]
        return grid[torch.stack(orders)[:, :number]].to(sample.final)

    def _loss(self, policy: Policy, sample: Trajectory, rho: Tensor, at: Noised) -> Loss:
        config = self.config
        v_old = fixed_velocity(policy, "old", sample, at)
        v_ref = fixed_velocity(policy, "reference", sample, at) if config.kl_weight > 0 else None
        v = velocity(policy, sample, at)
        positive, negative = branch_losses(at.x0, at.x, at.t, v, v_old, config.beta, config.weighting)
        policy_loss = config.adv_clip * (rho * positive + (1 - rho) * negative) / config.beta
        rows, means = policy_loss, {"policy_loss": policy_loss, "positive_loss": positive, "negative_loss": negative}
        means["old_deviate"] = mean_square(v - v_old)
        if v_ref is not None:
            means["kl"] = penalty(v, v_ref, at, "uniform")
            rows = rows + config.kl_weight * means["kl"]
        return Loss(rows, {name: value.detach() for name, value in means.items()})

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        decay = self.config.decay(updates)
        policy.blend("old", decay)
        return {"old_decay": decay}


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""


_IMAGES: dict[str, Any] = {"size": (512, 512), "prompts_per_step": 48, "samples_per_prompt": 24}


def _preset(num_steps: int, beta: float, **algorithm: Any) -> dict[str, Any]:
    return {
        "rollout": {"num_steps": num_steps, "guidance_scale": 1.0, "solver": "dpmpp_2m", **_IMAGES},
        "algorithm": {"name": "nft", "beta": beta, "kl_weight": 1e-4, **algorithm},
        "optimizer": {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": {"decay": 0.9, "every": 8},
        "model": {"lora": {"rank": 32, "alpha": 64}},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "nft_sd35": _preset(10, beta=1.0, old_decay=1, updates_per_step=1),
    "nft_sd35_ocr": _preset(10, beta=0.1, old_decay=2, updates_per_step=2),
    "nft_sd35_multi": _preset(25, beta=0.1, old_decay=1, updates_per_step=1),
}
