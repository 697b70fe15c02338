"""AlignProp: ascent on a differentiable reward through a random number of last steps (arXiv 2310.03739).

    L = -r(x_0)        gradients reach back through the last K of N steps, K drawn anew for every batch

    uniform    K ~ U{1 .. N}, the paper's
    gaussian   N - K ~ N(mean, std), in steps of 50: the public code's, which so trains the last steps most
    fixed      K = last_steps: DRaFT-K

Metrics: ``policy_loss`` = -r times loss_scale · ``reward_with_graph`` = r of the pictures that the learner made.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms import reward_gradients
from rlalign.algorithms.base import Loss
from rlalign.algorithms.reward_gradients import GradientSettings, RewardGradient, denoise, step_of
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

CODE_STEPS = 50  # of the public code, in which mean and std count


class Config(GradientSettings):
    """The algorithm block with ``name: alignprop``."""

    name: Literal["alignprop"] = "alignprop"
    """This algorithm."""
    truncation: Literal["uniform", "gaussian", "fixed"] = "uniform"
    """How K is drawn."""
    mean: float = Field(default=42.0, ge=0, le=CODE_STEPS)
    """Of the first step with a gradient, out of 50; for ``gaussian``."""
    std: float = Field(default=5.0, ge=0)
    """Its standard deviation."""
    last_steps: int = Field(default=1, ge=1)
    """K of ``fixed``."""


class Algorithm(RewardGradient):
    def __init__(self, config: Config) -> None:
        self.config = config

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        num_steps = sample.schedule.num_steps
        trained = range(num_steps - self.last_steps(num_steps, step_of(sample), noise), num_steps)
        latents = denoise(policy, sample, noise, trained, self.config.checkpointing)
        yield self.loss(policy, sample, latents, self.config)

    def last_steps(self, num_steps: int, step: int, noise: Noise) -> int:
        """K of the batch of this training step, in 1..num_steps."""
        config = self.config
        if config.truncation == "fixed":
            return min(config.last_steps, num_steps)
        if config.truncation == "uniform":
            return 1 + noise.integer("train/truncation", (step, 0, 0), num_steps)
        drawn = noise.normal("train/truncation", torch.tensor([[step, 0, 0]]), 0, ()).item()
        first = round((config.mean + config.std * drawn) * num_steps / CODE_STEPS)
        return num_steps - min(max(first, 0), num_steps - 1)


OVERLAY: dict[str, Any] = reward_gradients.OVERLAY

PRESETS: dict[str, dict[str, Any]] = {
    "alignprop_sd15": {
        "rollout": {"size": (512, 512), "num_steps": 50, "guidance_scale": 5.0, "solver": "euler"},
        "algorithm": {"name": "alignprop", "truncation": "gaussian", "loss_scale": 0.01},
        "optimizer": {"lr": 1e-3},
        "model": {"lora": {"rank": 4, "alpha": 4}},
    },
}
"""The public code's settings."""
