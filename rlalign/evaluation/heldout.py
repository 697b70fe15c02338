"""Evaluation on held-out prompts: fixed addresses, deterministic steps, no effect on the run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.pipeline import split
from rlalign.policy import RolloutConfig
from rlalign.prompts import PromptSet, evenly
from rlalign.runtime.pool import Pool
from rlalign.settings import Settings
from rlalign.types import Prompt, Scores, Unit

GRID_PROMPTS = 8


class EvaluationConfig(Settings):
    """Held-out evaluation, before the first update, every few steps and after the last."""

    every: int = Field(default=20, ge=0)
    """Steps between evaluations; 0: only at the start and the end."""
    num_images: int = Field(default=512, ge=2)
    """Images in all: num_images / samples_per_prompt prompts, spread evenly over the held-out file."""
    samples_per_prompt: int = Field(default=4, ge=2)
    """Images of a prompt; diversity is measured between them."""
    weights: Literal["policy", "ema", "old"] = "policy"
    """Which weights are judged."""
    num_steps: int = Field(default=20, ge=1)
    """Denoising steps."""
    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance."""
    solver: Literal["euler", "dpmpp_2m"] = "euler"
    """ODE solver."""

    def due(self, step: int, last: int) -> bool:
        return step in (0, last) or (self.every > 0 and step % self.every == 0)

    def prompts(self, heldout: PromptSet) -> tuple[Prompt, ...]:
        """As many as make ``num_images``, from all over the file."""
        return heldout.spread(-(-self.num_images // self.samples_per_prompt))

    def rollout(self, training: RolloutConfig) -> RolloutConfig:
        """How evaluation samples: the training settings with its own solver, steps and guidance."""
        changes = {name: getattr(self, name) for name in ("num_steps", "guidance_scale", "solver")}
        return training.model_copy(update={**changes, "window": None, "init_noise": "independent"})


@dataclass(frozen=True, slots=True)
class Evaluation:
    metrics: dict[str, float]  # under their names without the eval/ in front
    pictures: Tensor  # [prompts, G, 3, h, w] uint8: a few groups, the same ones as were judged, as grids show them
    captions: list[str]


def evaluate(
    samplers: Pool,
    scorers: Pool,
    prompts: PromptSet,
    settings: EvaluationConfig,
    training: RolloutConfig,
    seen: Callable[[Tensor], None] | None = None,
) -> Evaluation:
    """Scores of every role on the same prompts and the same initial noise, whatever the step.

    ``seen`` is called with the pictures that were judged, [B, (F,) 3, H, W] uint8, a unit at a time and in order.
    """
    plan, samples = settings.rollout(training), settings.samples_per_prompt
    chosen = settings.prompts(prompts)
    units = split(0, chosen, samples, plan.micro_batch, purpose="evaluation")
    images = [samplers.submit("sample", unit, plan, settings.weights, returns=2)[1] for unit in units]
    roles = ("train", "monitor", "heldout")
    scored = [scorers.submit("score", image, unit, roles) for unit, image in zip(units, images, strict=True)]
    scores = Scores.concat(scorers.get(scored))
    if seen is not None:
        for image in images:
            seen(*samplers.get([image]))
    shown = evenly(len(chosen), GRID_PROMPTS)
    unit = Unit(0, shown, tuple(chosen[group] for group in shown), samples, "evaluation")
    (pictures,) = samplers.get([samplers.submit("show", unit, plan, settings.weights)])
    return Evaluation(summary(scores), pictures.unflatten(0, (-1, samples)), [prompt.text for prompt in unit.prompts])


def base_pictures(
    samplers: Pool, prompts: PromptSet, settings: EvaluationConfig, training: RolloutConfig
) -> Iterator[Tensor]:
    """What ``evaluate`` would judge, [B, (F,) 3, H, W] uint8 a unit, as the untrained weights draw it."""
    plan, samples = settings.rollout(training), settings.samples_per_prompt
    units = split(0, settings.prompts(prompts), samples, plan.micro_batch, purpose="evaluation")
    for image in [samplers.submit("sample", unit, plan, "reference", returns=2)[1] for unit in units]:
        yield from samplers.get([image])


def summary(scores: Scores) -> dict[str, float]:
    """Means over images with a valid score, each detail over the images it applies to, and the raw diversity."""
    metrics = {"reward/mean": _mean(scores.total[scores.valid])} if scores.training else {}
    for name, reward in scores.rewards.items():
        metrics[f"reward/{name}/mean"] = _mean(reward.values[reward.valid])
        for detail, values in reward.details.items():
            metrics[detail] = _mean(values[reward.valid & ~values.isnan()])
    if scores.distance is not None:
        metrics["distance"] = _mean(scores.distance)
    return metrics


def _mean(values: Tensor | Sequence[float]) -> float:
    return float(torch.as_tensor(values).double().mean())
