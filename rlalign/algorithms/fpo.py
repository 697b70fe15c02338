"""Flow policy optimisation: PPO whose ratio comes from flow-matching losses of the same noise (arXiv 2507.21053).

    ρ  = exp(mean over T pairs (t, ε) of ℓ_θ - ℓ_old)         ℓ = -w(t) mean (v - ε + x0)²
    L  = mean over samples of  max(-A ρ, -A clip(ρ, 1 ± ε)) + β w_kl(t) mean (v_θ - v_ref)²

A sample keeps its pairs through all updates of a step. Few pairs make ρ too large on average (Jensen), T = 1 most.

Metrics: ``policy_loss`` before the penalty · ``kl`` = w_kl(t) mean (v_θ - v_ref)² when its weight is positive · the
ratio's metrics as in grpo.py.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith
from rlalign.algorithms.forward import RatioSettings, look
from rlalign.algorithms.losses import clipped_policy_loss, ratio, ratio_means
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Variant
from rlalign.types import Trajectory


class Config(RatioSettings):
    """The algorithm block with ``name: fpo``."""

    name: Literal["fpo"] = "fpo"
    """This algorithm."""
    times: Literal["grid", "uniform", "logit_normal"] = "uniform"
    """grid: the rollout's own levels, in each row's order; else one of T strata of (0, 1) each, shifted."""
    num_times: int = Field(default=8, ge=1)
    """T: pairs of a time and a noise a sample."""
    estimate: Literal["time", "sample"] = "sample"
    """sample is the paper's ratio, of the mean over the pairs, for one more pass each; time: of each pair alone."""
    clip_range: float = Field(default=0.05, gt=0)
    """ε of the ratio."""
    updates_per_step: int = Field(default=2, ge=1)
    """Optimizer steps of a pass over the batch, each on its own share of groups; with one in all the ratio is 1."""


class Algorithm(GroupRelative):
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        copies = () if config.single else ("start",)
        self.needs = Needs(trajectory=False, copies=copies, silent_zero=True)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        config, epsilon = self.config, self.config.clip_range
        others: list[Variant] = [config.began_with, "reference"] if config.kl_weight > 0 else [config.began_with]
        for seen in look(policy, sample, noise, config, others):
            rho = ratio(seen.likelihood, seen.fixed[config.began_with])
            rows = clipped_policy_loss(rho, advantages, epsilon, epsilon)
            means = {"policy_loss": rows.detach(), **ratio_means(rho, epsilon, epsilon)}
            if config.kl_weight > 0:
                rows = rows + config.kl_weight * seen.distances["reference"]
                means["kl"] = seen.distances["reference"].detach()
            yield Loss(rows * seen.share, means, {"ratio/max_abs_dev": (rho.detach() - 1).abs()})

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        if "start" in self.needs.copies:
            policy.blend("start", 0.0)
        return {}


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""
