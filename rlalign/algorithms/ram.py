"""RAM: the velocity is regressed on the reference's, moved by the reward (arXiv 2605.10759).

    L  = mean over samples and times of  w(t) mean (v_θ - sg(v_ref + κ A (u - v_b)))²,      u = ε - x0
         + β w_kl(t) mean (v_θ - v_ref)²
    v_b = v_old as in the authors' code, or v_θ itself as in the paper
    after each step:  θ_old <- d θ_old + (1 - d) θ

At rest v_θ - v_ref = κ / (1 + β w_kl / w) E[A (u - v_b) | x_t]: the anchor is part of the regression, and 1 / κ its
weight. With v_b = v_θ the gradient is κ times that of RVM with β = 1 / κ; with v_ref = v_b = v_old it is that of NFT
with uniform weights, β_nft = 1 / (κ adv_clip), divided by its adv_clip β_nft.

Metrics: ``policy_loss`` before the penalty · ``moved`` = mean (v_θ - v_ref)² · ``kl`` = w_kl(t) times that, when its
weight is positive · ``old_decay`` = d of the step.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith, lag
from rlalign.algorithms.forward import ForwardSettings, Ramp, TimeWeighting, at_times, distance, penalty, velocities
from rlalign.algorithms.losses import mean_square
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Variant
from rlalign.types import Trajectory


class Config(ForwardSettings):
    """The algorithm block with ``name: ram``."""

    name: Literal["ram"] = "ram"
    """This algorithm."""
    weighting: TimeWeighting = "uniform"  # pyright: ignore[reportIncompatibleVariableOverride]
    """w(t) of the regression; where it rests does not depend on it unless kl_weight is positive."""
    kappa: float = Field(default=1.0, gt=0)
    """κ, how far an advantage of 1 moves the target: the inverse of the anchor's weight."""
    baseline: Literal["old", "policy"] = "old"
    """v_b: the lagged weights, or the policy itself, detached, which saves their pass."""
    times: Literal["grid", "uniform", "logit_normal"] = "uniform"
    """grid: the rollout's own levels, in each row's order; else one of T strata of (0, 1) each, shifted."""
    num_times: int = Field(default=8, ge=1)
    """T: times a sample; the method wants many."""
    old_decay: Ramp = Ramp(rate=0.001, max=0.5)
    """d by optimizer step."""


def target(v_ref: Tensor, v_baseline: Tensor, u: Tensor, advantages: Tensor, kappa: float) -> Tensor:
    """v_ref + κ A (u - v_b) [b, *L]; advantages [b]."""
    wide = advantages.reshape(-1, *[1] * (u.ndim - 1))
    return v_ref + kappa * wide * (u - v_baseline)


class Algorithm(GroupRelative):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        lagged = config.baseline == "old"
        self.sample_with: SampleWith = "old" if lagged else "policy"
        self.needs = Needs(trajectory=False, copies=("old",) if lagged else ())

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        config, others = self.config, list[Variant](["reference", self.config.baseline])
        for at in at_times(config, sample, noise):
            v, fixed = velocities(policy, sample, at, others)
            goal = target(fixed["reference"], fixed[config.baseline], at.velocity, advantages, config.kappa)
            rows = distance(v, goal.to(v), at, config.weighting)
            moved = mean_square(v.detach() - fixed["reference"])
            means = {"policy_loss": rows.detach(), "moved": moved}
            if config.kl_weight > 0:
                kl = penalty(v, fixed["reference"], at, config.kl_weighting)
                rows, means["kl"] = rows + config.kl_weight * kl, kl.detach()
            yield Loss(rows / config.num_times, means)

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        return lag(policy, self.needs.copies, self.config.old_decay.at(updates))


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""
