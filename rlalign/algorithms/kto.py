"""Diffusion-KTO: thumbs up or down for single samples, no pairs (arXiv 2404.04465, eq. 8).

    Δ = ℓ_θ - ℓ_ref,  ℓ = -w(t) mean_D ‖v(x_t, t) - (ε - x0)‖²      how much likelier a sample became; (t, ε) by group;
                                                                    ‖ε_θ - ε‖² for models of the noise (forward.py)
    z = max(0, mean of Δ over the group), detached                  where a gain begins to count
    L = mean over rows and times of  λ (1 - σ(± β (Δ - z)))         + for liked ones, - for the others

A sample is liked if its advantage is above the mean of its group, which is 0, or above the group's median; groups that
tie have neither. With ``positive`` recorded thumbs, scores of 1 and -1, stand for themselves. The public code takes z
over the batch on a device; here it is the group's, so that it does not depend on how rows are packed.

Metrics: ``policy_loss`` · ``z_ref`` = β z · ``accuracy`` = share of rows with ± (Δ - z) > 0 · ``liked_gain`` and
``disliked_gain`` = the group's mean β Δ of each kind.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith
from rlalign.algorithms.forward import (
    Noised,
    TimeSettings,
    Weighting,
    at_times,
    group_index,
    likelihood,
    velocities,
)
from rlalign.algorithms.regularise import Anchored
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Scores, Trajectory


class Config(TimeSettings, Anchored):
    """The algorithm block with ``name: kto``."""

    name: Literal["kto"] = "kto"
    """This algorithm."""
    beta: float | None = Field(default=None, gt=0)
    """β of mean errors; null: a sixteenth of the number of latent elements, the public code's 1000 for SD1.5."""
    liked: Literal["above_mean", "above_median", "positive"] = "above_mean"
    """Which samples of a group get the thumb up; positive: those of scores above 0, whatever the others have."""
    liked_weight: float = Field(default=1.0, ge=0)
    """λ of liked samples."""
    disliked_weight: float = Field(default=1.0, ge=0)
    """λ of the others."""
    weighting: Weighting = "uniform"
    """w(t) of the errors."""


def thumbs(advantages: Tensor, valid: Tensor, median: bool) -> Tensor:
    """[P, G]: 1 above the group's mean, 0, or its (lower) median; -1 below or equal; 0 where all advantages are 0."""
    middle = torch.where(valid, advantages, torch.nan).nanmedian(1, keepdim=True).values if median else 0.0
    told = valid & (advantages != 0).any(1, keepdim=True)
    return torch.where(told, (advantages > middle).to(advantages) * 2 - 1, 0)


def mean_where(values: Tensor, where: Tensor, group: Tensor) -> Tensor:
    """[b]: for each row the mean of its group's values over rows with ``where``, 0 if there is none."""
    own, told, at = (values * where).cpu(), where.to(values).cpu(), group.cpu()  # a GPU adds in no fixed order
    zeros = own.new_zeros(int(at.max()) + 1)
    return (zeros.index_add(0, at, own) / zeros.index_add(0, at, told).clamp(min=1))[at].to(values)


def kto_loss(gain: Tensor, sign: Tensor, group: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """1 - σ(± β (Δ - z)) [b], 0 for rows without a thumb, and z [b]."""
    z = mean_where(gain.detach(), sign != 0, group).clamp(min=0)
    return (1 - torch.sigmoid(sign * beta * (gain - z))) * sign.abs(), z


class Algorithm(GroupRelative):
    needs = Needs(trajectory=False, silent_zero=True, whole_groups=True)
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def advantages(self, scores: Scores) -> Tensor:
        if self.config.liked == "positive":
            total = self.multipliers.weighted(scores).total
            return torch.where(scores.valid, (total > 0).to(total) * 2 - 1, 0)
        values = super().advantages(scores)
        counted = scores.valid if self.config.select == "all" else scores.valid & (values != 0)
        return thumbs(values, counted, self.config.liked == "above_median")

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        for at in at_times(self.config, sample, noise, by_group=True):
            loss = self._loss(policy, sample, advantages, at)
            yield Loss(loss.rows / self.config.num_times, loss.means)

    def _loss(self, policy: Policy, sample: Trajectory, sign: Tensor, at: Noised) -> Loss:
        config, group = self.config, group_index(sample)
        beta = config.beta or sample.final[0].numel() / 16
        v, fixed = velocities(policy, sample, at, ["reference"])
        gain = likelihood(v, at, config.weighting) - likelihood(fixed["reference"], at, config.weighting)
        plain, z = kto_loss(gain, sign.to(gain), group, beta)
        rows = torch.where(sign > 0, config.liked_weight, config.disliked_weight) * plain
        means = {
            "policy_loss": rows,
            "z_ref": beta * z,
            "accuracy": (sign * (gain - z) > 0).to(gain),
            "liked_gain": beta * mean_where(gain, sign > 0, group),
            "disliked_gain": beta * mean_where(gain, sign < 0, group),
        }
        return Loss(rows, {name: value.detach() for name, value in means.items()})


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""


def _public(prompts: int, samples: int, **rollout: Any) -> dict[str, Any]:
    shape = {"size": (512, 512), "prompts_per_step": prompts, "samples_per_prompt": samples}
    return {
        "rollout": {**shape, "solver": "euler", "kernel": "ddim", **rollout},
        "algorithm": {"name": "kto", "beta": 1000.0, "num_times": 1, "times": "uniform"},
        "optimizer": {"lr": 1e-7, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "max_grad_norm": 1.0},
        "model": {"lora": None},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "kto_sd15": _public(256, 8),
    "kto_sd15_pairs": _public(1024, 2, source="data"),
}
"""β, batch of 2048 images and lr of the public code, which trains on a data set of liked and disliked images; here a
prompt needs two of them or more."""
