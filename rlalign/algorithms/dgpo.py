"""Direct group preference optimisation: a group's good samples against its bad ones, as a whole (arXiv 2510.08425).

    e_i = w(t) mean (v_θ - u_i)²,  u_i = ε - x0_i         t and ε shared by the group
    S_g = (β / G) sum over the group of  A_i (e_i - e_i^ref)
    L   = mean over samples and times of  sg[σ(S_g)] A_i e_i + β_KL w_kl(t) mean (v_θ - v_ref)²
    no gradient of e_i where A_i > 0 and q_i > 1 + ε, or A_i <= 0 and q_i < 1 - ε;      q_i = exp(e_i^old - e_i)
    after each step:  θ_old <- d θ_old + (1 - d) θ

Its first term is, up to β, the gradient of -log σ(-S_g), the group's preference loss; σ is the logistic function and
½ at the start. A group needs at least two samples that differ.

Metrics: ``policy_loss`` before the penalty · ``group_weight`` = σ(S_g) · ``kl`` = w_kl(t) mean (v_θ - v_ref)² when its
weight is positive · ``clip_fraction`` and ``ratio/mean`` of q, when it is clipped · ``old_decay`` = d of the step.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Copy, Loss, Needs, SampleWith, lag
from rlalign.algorithms.forward import (
    ForwardSettings,
    Noised,
    Ramp,
    at_times,
    beyond,
    error,
    group_index,
    group_mean,
    penalty,
    velocities,
)
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Variant
from rlalign.types import Trajectory


class Config(ForwardSettings):
    """The algorithm block with ``name: dgpo``."""

    name: Literal["dgpo"] = "dgpo"
    """This algorithm."""
    beta: float = Field(default=10.0, gt=0)
    """β of the group's preference: the larger, the sooner a group that is already told apart stops to count."""
    clip_range: float | None = Field(default=0.05, gt=0)
    """ε of q against the old weights; null: no clip and, with the next key, no old weights."""
    compare_with: Literal["reference", "old"] = "reference"
    """Whose errors e^ref are."""
    kl_weight: float = Field(default=0.001, ge=0)
    """β_KL of the penalty towards the reference."""
    clip_kl: bool = False
    """True takes the penalty's gradient away, too, where that of e_i is."""
    old_decay: Ramp = Ramp(rate=0.001, max=0.3)
    """d by optimizer step."""
    rollouts: Literal["policy", "old"] = "policy"
    """Whose samples are learnt from."""
    old_after: int = Field(default=0, ge=0)
    """With rollouts: old, optimizer steps before which the policy itself samples: 200 or 500 in the authors' runs."""

    @property
    def lagged(self) -> Literal["old", "teacher"]:
        """The name of θ_old, which is ``old`` itself unless that is the policy for a while."""
        return "teacher" if self.rollouts == "old" and self.old_after else "old"

    @property
    def compared(self) -> Variant:
        """Whose errors e^ref are."""
        return self.lagged if self.compare_with == "old" else "reference"

    @property
    def others(self) -> list[Variant]:
        """Weights whose errors or velocities are asked for."""
        wanted: dict[Variant, bool] = {
            self.lagged: self.clip_range is not None or self.compare_with == "old",
            "reference": self.kl_weight > 0 or self.compare_with == "reference",
        }
        return [name for name, needed in wanted.items() if needed]


def group_weight(gained: Tensor, advantages: Tensor, group: Tensor, beta: float) -> Tensor:
    """σ(S_g) [b] without a graph, S_g = β mean_g A_i (e_i - e_i^ref); ``gained`` = e - e^ref [b], group [b] index."""
    return (beta * group_mean(advantages * gained.detach(), group)).sigmoid()


class Algorithm(GroupRelative):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.sample_with: SampleWith = config.rollouts
        lags = config.lagged in config.others or config.rollouts == "old"
        copies: tuple[Copy, ...] = ("teacher", "old") if config.lagged == "teacher" else ("old",) if lags else ()
        self.needs = Needs(trajectory=False, copies=copies, whole_groups=True)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        group = group_index(sample)
        for at in at_times(self.config, sample, noise, by_group=True):
            v, fixed = velocities(policy, sample, at, self.config.others)
            loss = self._loss(v, fixed, at, advantages, group)
            yield Loss(loss.rows / self.config.num_times, loss.means)

    def _loss(self, v: Tensor, fixed: dict[Variant, Tensor], at: Noised, advantages: Tensor, group: Tensor) -> Loss:
        config, means = self.config, dict[str, Tensor]()
        errors = {name: error(other, at, config.weighting) for name, other in fixed.items()}
        e, still = error(v, at, config.weighting), torch.zeros_like(advantages, dtype=torch.bool)
        means["group_weight"] = group_weight(e - errors[config.compared], advantages, group, config.beta)
        if config.clip_range is not None:
            q = (errors[config.lagged] - e.detach()).exp()
            still = beyond(q, advantages, config.clip_range, config.clip_range)
            means |= {"ratio/mean": q, "clip_fraction": still.float()}
        rows = means["group_weight"] * advantages * torch.where(still, e.detach(), e)
        means["policy_loss"] = rows.detach()
        if config.kl_weight > 0:
            kl = penalty(v, fixed["reference"], at, config.kl_weighting)
            rows = rows + config.kl_weight * (torch.where(still, kl.detach(), kl) if config.clip_kl else kl)
            means["kl"] = kl.detach()
        return Loss(rows, means)

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        metrics = lag(policy, self.needs.copies, self.config.old_decay.at(updates))
        if self.config.lagged == "teacher":
            policy.copy("old", "teacher" if updates >= self.config.old_after else "policy")
        return metrics


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""


def _preset(guidance: float, prompts: int, samples: int, beta: float, clip_range: float, kl: float) -> dict[str, Any]:
    return {
        "rollout": {
            "num_steps": 10,
            "guidance_scale": guidance,
            "size": (512, 512),
            "prompts_per_step": prompts,
            "samples_per_prompt": samples,
            "shift": 3.0,
        },
        "algorithm": {
            "name": "dgpo",
            "beta": beta,
            "clip_range": clip_range,
            "kl_weight": kl,
            "num_times": 4,
            "time_range": (0.6, 1.0),
            "updates_per_step": 1,
        },
        "optimizer": {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": {"decay": 0.9, "every": 8},
        "model": {"lora": {"rank": 64, "alpha": 128}},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "dgpo_sd35": _preset(4.5, 8, 16, beta=100.0, clip_range=0.01, kl=0.02),
    "dgpo_sd35_pickscore": _preset(1.0, 24, 24, beta=10.0, clip_range=0.05, kl=0.001),
}
"""Four of the seven noisiest of ten levels are trained. The second is the variant without guidance."""
