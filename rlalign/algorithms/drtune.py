"""DRTune: deep reward supervision with the gradient stopped at the net's input (arXiv 2405.00760).

    x_{k+1} = a_k x_k + b_k net(sg(x_k), t_k, c)        L = -r(x_0)        the net has a graph in some steps only

Without the product of the net's Jacobians, gradients of early steps neither explode nor need the later activations, so
the composition of a picture can be trained, not only its texture. Trained are T steps at equal distances, the first of
them drawn for every batch. Which steps the paper trains is to be verified.

Metrics: ``policy_loss`` = -r times loss_scale · ``reward_with_graph`` = r of the pictures that the learner made.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms import reward_gradients
from rlalign.algorithms.base import Loss
from rlalign.algorithms.reward_gradients import GradientSettings, RewardGradient, denoise, step_of
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory


class Config(GradientSettings):
    """The algorithm block with ``name: drtune``."""

    name: Literal["drtune"] = "drtune"
    """This algorithm."""
    trained_steps: int = Field(default=5, ge=1)
    """T: steps in which the net is trained; more than the rollout has means all."""


class Algorithm(RewardGradient):
    def __init__(self, config: Config) -> None:
        self.config = config

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        trained = self.steps(sample.schedule.num_steps, step_of(sample), noise)
        latents = denoise(policy, sample, noise, trained, self.config.checkpointing, around=True)
        yield self.loss(policy, sample, latents, self.config)

    def steps(self, num_steps: int, step: int, noise: Noise) -> list[int]:
        """Those that are trained in the batch of this training step, in order."""
        distance = num_steps / min(self.config.trained_steps, num_steps)
        first = noise.integer("train/steps", (step, 0, 0), max(1, int(distance)))
        return [first + int(number * distance) for number in range(min(self.config.trained_steps, num_steps))]


OVERLAY: dict[str, Any] = reward_gradients.OVERLAY
