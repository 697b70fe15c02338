"""RVM: velocity regression weighted by signed advantages (arXiv 2608.23664).

    L  = mean over samples and times of  w(t) A mean (v_θ - u)² + β w_kl(t) mean (v_θ - v_ref)²,      u = ε - x0
    A  = adv_scale clip(A, ±adv_clip)

A good sample is a target, a bad one is pushed away from, without end where no anchor holds: with β = 0 small steps on
fresh samples follow p e^(S r), S the way gone so far. With β it rests where v_θ - v_ref = w / (β w_kl) Cov(A, u | x_t),
the exact tilt for Gaussian data, a linear reward and w = w_kl. AWM with a ratio of 1 has the same gradient, and NFT at
its old weights; RAM is RVM with an anchor.

Metrics: ``policy_loss`` before the penalty · ``error`` = w(t) mean (v_θ - u)² · ``kl`` = w_kl(t) mean (v_θ - v_ref)²
when its weight is positive.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith
from rlalign.algorithms.forward import ForwardSettings, regression
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Scores, Trajectory


class Config(ForwardSettings):
    """The algorithm block with ``name: rvm``."""

    name: Literal["rvm"] = "rvm"
    """This algorithm."""
    adv_scale: float = Field(default=0.1, gt=0)
    """Advantages are multiplied by it after the clamp."""
    times: Literal["grid", "uniform", "logit_normal"] = "uniform"
    """grid: the rollout's own levels, in each row's order; else one of T strata of (0, 1) each, shifted."""


class Algorithm(GroupRelative):
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.needs = Needs(trajectory=False, silent_zero=True)

    def advantages(self, scores: Scores) -> Tensor:
        return self.config.adv_scale * super().advantages(scores)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        yield from regression(policy, sample, advantages, noise, self.config)


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""
