"""A whole learner and sampler on data whose velocity is known: seconds, no diffusers, no files."""

from typing import Any, Literal

import torch

from rlalign.algorithms import grpo, nft
from rlalign.algorithms.base import Algorithm
from rlalign.mdp.noise import Noise
from rlalign.models import analytic
from rlalign.models.lora import full
from rlalign.pipeline import split
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Prompt, RewardScores, Scores, Trajectory
from rlalign.workers.learner import EmaConfig, Learner
from rlalign.workers.optimizer import OptimizerConfig
from rlalign.workers.sampler import Sampler

PROMPTS = tuple(Prompt(f"prompt {i}") for i in range(4))
SAMPLES = 6


def rollout_config(**changes: Any) -> RolloutConfig:
    values = {"prompts_per_step": 4, "samples_per_prompt": SAMPLES, "num_steps": 6, "size": (1, 2), "micro_batch": 8}
    return RolloutConfig(**{**values, "window": {"size": 3, "range": (0, 5)}, **changes})


def policy(settings: RolloutConfig | None = None) -> Policy:
    config = analytic.Config(means=[[0.0, 0.0], [2.0, 1.0]])
    family = analytic.Family.load(config, "", torch.float32, "cpu")
    return Policy(family, settings or rollout_config(), full(family.nets, ["velocity"]), lora=False)


def algorithm(name: str = "grpo", **changes: Any) -> Algorithm:
    module = {"grpo": grpo, "nft": nft}[name]
    return module.Algorithm(module.Config(**changes))


def workers(
    chosen: Algorithm,
    settings: RolloutConfig | None = None,
    lr: float = 1e-2,
    ema: EmaConfig | None = None,
    kind: Literal["adamw", "adamw8bit"] = "adamw",
    **more: Any,
) -> tuple[Sampler, Learner]:
    """A sampler and a learner that share one policy."""
    shared, noise = policy(settings or rollout_config(candidates=2 if chosen.needs.candidates else None)), Noise(0)
    if chosen.needs.reward_gradient:
        vars(chosen)["reward"] = lambda images, prompts: analytic.numbers(images)[:, 0]
    learner = Learner(shared, chosen, noise, OptimizerConfig(kind=kind, lr=lr), ema, **more)
    needs = chosen.needs
    return Sampler(shared, noise, chosen.sample_with, needs.trajectory, shares=True, keep_uncond=needs.uncond), learner


def sample(sampler: Sampler, step: int = 0) -> list[Trajectory]:
    units = split(step, PROMPTS, SAMPLES, sampler.policy.settings.micro_batch)
    return [sampler.sample(unit)[0] for unit in units]


def scored(trajectories: list[Trajectory]) -> Scores:
    """The reward is the first number of a sample."""
    values = torch.cat([t.final for t in trajectories]).flatten(1)[:, 0].reshape(len(PROMPTS), SAMPLES)
    texts = tuple(prompt.text for prompt in PROMPTS)
    return Scores({"first": RewardScores(values, torch.ones_like(values, dtype=torch.bool), "train", 1.0)}, texts)
