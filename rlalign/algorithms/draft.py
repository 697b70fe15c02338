"""DRaFT: ascent on a differentiable reward through the last steps of the sampler (arXiv 2309.17400).

    DRaFT-K    L = -r(x_0)                              gradients reach back through the last K of N steps
    DRaFT-LV   L = -mean_i r(x̂_0(x_i)), i = 1 .. n      K = 1; x_i = α x_0 + σ ε_i, the sample noised to the last level
                                                        again: n gradients for the price of one sample

There is no fixed point but the reward's maximum: what keeps the model sane is early stopping, a small LoRA and its
scale, and rewards that are held out.

Metrics: ``policy_loss`` = -r times loss_scale · ``reward_with_graph`` = r of the pictures that the learner made.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms import reward_gradients
from rlalign.algorithms.base import Loss
from rlalign.algorithms.reward_gradients import GradientSettings, RewardGradient, denoise, predict
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory


class Config(GradientSettings):
    """The algorithm block with ``name: draft``."""

    name: Literal["draft"] = "draft"
    """This algorithm."""
    last_steps: int = Field(default=1, ge=1)
    """K: steps at the end that gradients go through; more than the rollout has means all."""
    noised_copies: int = Field(default=0, ge=0)
    """n of DRaFT-LV; 0 is DRaFT-K."""


class Algorithm(RewardGradient):
    def __init__(self, config: Config) -> None:
        self.config = config

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        config, last = self.config, sample.schedule.num_steps - 1
        if not config.noised_copies:
            steps = range(max(0, last + 1 - config.last_steps), last + 1)
            yield self.loss(policy, sample, denoise(policy, sample, noise, steps, config.checkpointing), config)
            return
        level = sample.schedule.level(last, sample.final)
        for copy in range(config.noised_copies):
            epsilon = noise.normal("train/noise", sample.address, copy, policy.latent_shape).to(sample.final)
            again = level.alpha * sample.final + level.sigma * epsilon
            found = self.loss(policy, sample, predict(policy, sample, again, last, config.checkpointing).x0, config)
            yield Loss(found.rows / config.noised_copies, found.means)


OVERLAY: dict[str, Any] = reward_gradients.OVERLAY

PRESETS: dict[str, dict[str, Any]] = {
    "draft_lv": {"algorithm": {"name": "draft", "last_steps": 1, "noised_copies": 2}},
}
"""The paper's low-variance variant."""
