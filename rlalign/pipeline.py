"""Prompts -> rollouts -> rewards, at most max_staleness + 1 batches under way.

    launch(step)  ->  sampler.sample(unit)  ->  trajectory (stays for the learner)
                                            ->  images -> scorer.score -> scores (small, to the driver)

A batch is launched only when a slot is free, so nothing is born staler than ``max_staleness`` versions.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlalign.policy import RolloutConfig
from rlalign.prompts import PromptSet, drawn
from rlalign.runtime.pool import Pool
from rlalign.scoring import require_valid_group
from rlalign.types import Prompt, Scores, Unit
from rlalign.workers.learner import turns_of


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: references to its trajectories and scores, unit by unit."""

    step: int
    units: list[Unit]
    trajectories: list[Any]  # Ref -> Trajectory
    scores: list[Any]  # Ref -> Scores


class Pipeline:
    def __init__(
        self,
        samplers: Pool,
        scorers: Pool,
        prompts: PromptSet,
        settings: RolloutConfig,
        seed: int,
        steps: range,
        max_staleness: int,
    ) -> None:
        self.samplers, self.scorers = samplers, scorers
        self.prompts, self.settings, self.seed = prompts, settings, seed
        self.steps = iter(steps)
        self.slots = max_staleness + 1
        self.under_way: deque[Batch] = deque()

    def take(self) -> Batch:
        """The oldest batch. The one before is used up: its slot starts on the weights published last."""
        self._launch()
        return self.under_way.popleft()

    def _launch(self) -> None:
        while len(self.under_way) < self.slots:
            step = next(self.steps, None)
            if step is None:
                return
            prompts = self.prompts.at(self.seed, step, self.settings.prompts_per_step)
            if self.settings.source == "data":
                prompts = drawn(prompts, self.settings.samples_per_prompt, self.seed, step)
            self.under_way.append(self._start(step, prompts))

    def _start(self, step: int, prompts: tuple[Prompt, ...]) -> Batch:
        units = split(step, prompts, self.settings.samples_per_prompt, self.settings.micro_batch)
        rollouts = [self.samplers.submit("sample", unit, returns=2) for unit in units]
        scores = [
            self.scorers.submit("score", images, unit, ("train",))
            for unit, (_, images) in zip(units, rollouts, strict=True)
        ]
        return Batch(step, units, [trajectory for trajectory, _ in rollouts], scores)


def split(
    step: int, prompts: tuple[Prompt, ...], samples: int, micro_batch: int, purpose: str = "rollout"
) -> list[Unit]:
    """Work units of whole groups, the fewest that fill whole micro-batches."""
    size = micro_batch // math.gcd(samples, micro_batch)
    return [
        Unit(step, tuple(range(start, start + len(part))), part, samples, purpose)
        for start in range(0, len(prompts), size)
        if (part := prompts[start : start + size])
    ]


def deal(batch: Batch, advantages: Tensor, valid: Tensor, ranks: int, updates: int) -> list[tuple[Any, ...]]:
    """Each learner rank's arguments of ``Learner.update``; advantages and valid are [P, G], updates those of a step.

    Every optimizer step has its share of the groups, and the ranks take them in turn. A rank gets references to the
    units that hold its groups, and to one more where it has none: passes of a sharded net need every rank.
    """
    if ranks == 1:
        return [(batch.trajectories, advantages, batch.step, valid)]
    turns = turns_of(len(advantages), updates)  # [P]
    sizes: list[int] = turns.bincount(minlength=updates).tolist()
    places = torch.cat([torch.arange(size) for size in sizes])  # [P] within the share of the optimizer step
    totals = [int(valid[turns == number].sum()) for number in range(updates)]
    of_units = torch.arange(len(advantages)).split([len(unit.groups) for unit in batch.units])

    def share(rank: int) -> tuple[Any, ...]:
        mine = places % ranks == rank  # [P]
        needed = [number for number, groups in enumerate(of_units) if mine[groups].any()] or [0]
        groups = torch.cat([of_units[number] for number in needed])
        own = torch.where(mine, turns, -1)[groups]
        references = [batch.trajectories[number] for number in needed]
        return references, advantages[groups], batch.step, valid[groups], own, totals

    return [share(rank) for rank in range(ranks)]


def gather(scorers: Pool, batch: Batch) -> Scores:
    """The batch's scores, groups in order; RewardError when no group has a valid one left to learn from."""
    scores = Scores.concat(scorers.get(batch.scores))
    require_valid_group(scores, batch.step)
    return scores
