"""What algorithms share that differentiate the reward: a denoising chain with a graph, its pictures and their rewards.

The learner repeats the deterministic rollout of its rows from the same noise, so no graph has to travel. The rewards
are those of the run with role train, and all of them have to be ``@differentiable``. With checkpointing the graph of
each step and of the decoder is made again in the backward pass: memory grows with the steps by a latent each.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from rlalign.algorithms.base import Loss, Needs, SampleWith, Stateless, UpdateSettings
from rlalign.mdp.noise import Noise
from rlalign.mdp.prediction import Prediction, from_network
from rlalign.mdp.solvers import SOLVERS, History
from rlalign.policy import Policy
from rlalign.types import Prompt, Scores, Trajectory

RewardSum = Callable[[Tensor, Sequence[Prompt]], Tensor]
"""Pictures [b, (F,) 3, H, W] in [0, 1] and their prompts -> weighted sum of the training rewards [b], with a graph."""

OVERLAY: dict[str, Any] = {"rollout": {"solver": "euler", "window": None}}


class GradientSettings(UpdateSettings):
    """The keys that all of these algorithms have."""

    loss_scale: float = Field(default=1.0, gt=0)
    """Factor of the reward in the loss; it matters beside optimizer.max_grad_norm only."""
    checkpointing: bool = True
    """Make the graph of each step again in the backward pass instead of keeping it."""


class RewardGradient(Stateless):
    """An algorithm but for its ``losses`` and its config."""

    needs = Needs(trajectory=False, reward_gradient=True)
    sample_with: SampleWith = "policy"
    reward: RewardSum

    def advantages(self, scores: Scores) -> Tensor:
        """[P, G]: 1 where there is a reward to be differentiated."""
        return scores.valid.float()

    def loss(self, policy: Policy, sample: Trajectory, latents: Tensor, settings: GradientSettings) -> Loss:
        """-r of the latents' pictures."""
        rewards = self.reward(pictures(policy, latents, settings.checkpointing), sample.prompts)
        rows = -settings.loss_scale * rewards
        return Loss(rows, {"policy_loss": rows.detach(), "reward_with_graph": rewards.detach()})


def denoise(
    policy: Policy,
    sample: Trajectory,
    noise: Noise,
    trained: Collection[int],
    checkpointing: bool,
    around: bool = False,
    until: int | None = None,
) -> Tensor:
    """The rows' samples [b, *L] once more; the net has a graph in the ``trained`` steps, and nowhere else.

    ``around``: gradients go around the net's input, along the chain's own linear path only (DRTune). ``until``: stops
    at that step and returns the clean latent that is predicted there.
    """
    x, history = start(policy, sample, noise), None
    solver, schedule = SOLVERS[policy.settings.solver], sample.schedule
    for k in range(schedule.num_steps):
        seen = x.detach() if around or k not in trained else x
        with torch.set_grad_enabled(k in trained):
            prediction = predict(policy, sample, seen, k, checkpointing and k in trained)
        if seen is not x:  # a prediction is linear in x and the net's output: this part is 0, but has x's gradient
            path = from_network(policy.family.prediction, torch.zeros_like(x), x - seen, schedule.level(k, x))
            prediction = Prediction(prediction.x0 + path.x0, prediction.eps + path.eps)
        if k == until:
            return prediction.x0
        x, history = step(solver, x, prediction, sample, k, history)
    return x


def start(policy: Policy, sample: Trajectory, noise: Noise) -> Tensor:
    """[b, *L]: the latents that these rows' rollouts began with."""
    address = sample.address
    if policy.settings.init_noise == "shared":
        address = address * address.new_tensor([1, 1, 0])
    return noise.normal("rollout/initial", address, 0, policy.latent_shape).to(sample.final)


def predict(policy: Policy, sample: Trajectory, x: Tensor, k: int, checkpointing: bool) -> Prediction:
    """At step k of the chain; with checkpointing its graph is made again in the backward pass."""
    if checkpointing:
        again: Any = checkpoint(_predict, policy, sample, x, k, use_reentrant=False)
        return again
    return _predict(policy, sample, x, k)


def _predict(policy: Policy, sample: Trajectory, x: Tensor, k: int) -> Prediction:
    time = sample.schedule.time[k].to(x.device).expand(len(x))
    level = sample.schedule.level(k, x)
    return policy.predict(x, time, level, *policy.conditions(sample), policy.settings.guidance_scale)


def step(
    solver: Any, x: Tensor, prediction: Prediction, sample: Trajectory, k: int, history: History | None
) -> tuple[Tensor, History | None]:
    """From point k of the chain to the next."""
    return solver(x, prediction, sample.schedule.level(k, x), sample.schedule.level(k + 1, x), history)


def pictures(policy: Policy, latents: Tensor, checkpointing: bool) -> Tensor:
    """[b, (F,) 3, H, W] in [0, 1]."""
    decoded = checkpoint(policy.decode, latents, use_reentrant=False) if checkpointing else policy.decode(latents)
    assert isinstance(decoded, Tensor)
    return decoded.float().clamp(0, 1)


def step_of(sample: Trajectory) -> int:
    """The training step whose rows these are: what is drawn from it is drawn for the whole batch."""
    return int(sample.address[0, 0])
