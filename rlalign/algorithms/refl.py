"""ReFL: the reward of the clean latent that one late step predicts (ImageReward, arXiv 2304.05977).

    L = λ φ(r(x̂_0(x_m))) + w mean (v_θ - u)²        φ(r) = relu(2 - r)

m is drawn for every batch from the last quarter of the steps. Steps before m run without a graph; the sampler's own
later steps are not needed. φ stops once the reward is above ``enough``, with r in ImageReward's scale of about -2 to 2.
The second term is the loss of pre-training, at one time of each of the images that prompts.train records
(``rollout.source: data``), without guidance; of the noise for models that predict it. φ and λ are to be verified
against the paper.

Metrics: ``policy_loss`` = λ φ(r) · ``reward_with_graph`` = r of the predicted picture · ``pretraining_error`` =
mean (v_θ - u)², when it has a weight.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms import reward_gradients
from rlalign.algorithms.base import Loss
from rlalign.algorithms.forward import TimeSettings, at_times, error
from rlalign.algorithms.reward_gradients import GradientSettings, RewardGradient, denoise, step_of
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

ONE_TIME = TimeSettings(times="uniform", num_times=1)


class Config(GradientSettings):
    """The algorithm block with ``name: refl``; ``loss_scale`` is λ."""

    name: Literal["refl"] = "refl"
    """This algorithm."""
    late: tuple[float, float] = (0.75, 1.0)
    """Shares of the chain between which m is drawn; the paper's is steps 30 to 39 of 40."""
    enough: float | None = None
    """Reward above which there is no gradient, 2 in the paper; null: φ(r) = -r, whatever the reward's scale."""
    loss_scale: float = Field(default=1.0, gt=0)
    """λ; the paper's is 1e-3, beside a pre-training loss of weight 1."""
    pretraining: float = Field(default=0.0, ge=0)
    """w of the pre-training loss on recorded images; above 0 it needs rollout.source: data."""


class Algorithm(RewardGradient):
    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs = replace(self.needs, recorded=config.pretraining > 0)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        at = self.step(sample.schedule.num_steps, step_of(sample), noise)
        found = self.loss(
            policy, sample, denoise(policy, sample, noise, [at], self.config.checkpointing, until=at), self.config
        )
        rows = found.rows
        if self.config.enough is not None:
            rows = (rows + self.config.loss_scale * self.config.enough).relu()
        yield Loss(rows, {**found.means, "policy_loss": rows.detach()})
        if self.config.pretraining:
            (seen,) = at_times(ONE_TIME, sample, noise)
            e = error(policy.predict_noised(sample, seen.x, seen.t, guidance=1.0).velocity, seen, "uniform")
            yield Loss(self.config.pretraining * e, {"pretraining_error": e.detach()})

    def step(self, num_steps: int, step: int, noise: Noise) -> int:
        """m of the batch of this training step."""
        low, high = (round(share * num_steps) for share in self.config.late)
        low = min(low, num_steps - 1)
        return low + noise.integer("train/late", (step, 0, 0), max(1, min(high, num_steps) - low))


OVERLAY: dict[str, Any] = reward_gradients.OVERLAY

PRESETS: dict[str, dict[str, Any]] = {
    "refl_sd15": {
        "rollout": {"size": (512, 512), "num_steps": 40, "guidance_scale": 7.5, "solver": "euler"},
        "algorithm": {"name": "refl", "enough": 2.0, "loss_scale": 1e-3},
        "optimizer": {"lr": 1e-5},
    },
}
"""For ImageReward; guidance and learning rate are to be verified."""
