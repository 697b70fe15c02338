"""Reward-weighted regression: the model is fitted to its own samples, the good ones more (arXiv 2302.12192; for flows
2502.06061).

    L  = mean over samples and times of  W w(t) mean (v_θ - u)² + α w_kl(t) mean (v_θ - v_ref)²,      u = ε - x0
    W  = exp(r / T), or G softmax(r / T) within the group; r is the reward or its advantage

One exact round multiplies the law by W / E[W], n rounds give p e^(n r / T): without the anchor a point mass in the end.
Only positives, so a bad sample is never pushed away from. ``advantages`` are the weights W, 0 for invalid rows.

Metrics: ``policy_loss`` before the penalty · ``error`` = w(t) mean (v_θ - u)² · ``kl`` = w_kl(t) mean (v_θ - v_ref)²
when its weight is positive.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith
from rlalign.algorithms.forward import ForwardSettings, regression
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Scores, Trajectory


class Config(ForwardSettings):
    """The algorithm block with ``name: rwr``."""

    name: Literal["rwr"] = "rwr"
    """This algorithm."""
    temperature: float = Field(default=1.0, gt=0)
    """T: the smaller, the more the best samples count."""
    weights: Literal["softmax", "exp"] = "softmax"
    """softmax: over the group, with mean 1; exp: e^(r/T), whose scale follows the rewards'."""
    of: Literal["advantage", "reward"] = "advantage"
    """r: the advantage, so that T does not depend on the reward's scale; or the reward itself, as in the papers."""

    @model_validator(mode="after")
    def _all_groups_count(self) -> "Config":
        if self.zero_std_groups == "drop":
            raise ValueError(
                "zero_std_groups: drop finds no group of rwr, whose samples all weigh something: leave it out"
            )
        return self


def group_softmax(values: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """n softmax(r / T) within a group of n valid rewards [P, G]: mean 1; 0 where invalid."""
    masked = torch.where(valid, values / temperature, -torch.inf)
    shares = (masked - masked.amax(1, keepdim=True).clamp(min=-1e30)).exp()
    return shares * valid.sum(1, keepdim=True) / shares.sum(1, keepdim=True).clamp(min=1e-30)


class Algorithm(GroupRelative):
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.needs = Needs(trajectory=False, silent_zero=True)

    def advantages(self, scores: Scores) -> Tensor:
        config, valid = self.config, scores.valid
        values = super().advantages(scores) if config.of == "advantage" else self.multipliers.weighted(scores).total
        values = torch.where(valid, values.double(), 0)
        if config.weights == "softmax":
            return group_softmax(values, valid, config.temperature).float()
        return torch.where(valid, (values / config.temperature).exp(), 0).float()

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        yield from regression(policy, sample, advantages, noise, self.config)


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""
