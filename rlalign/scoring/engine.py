"""Calls the rewards that are due on a unit of work and puts their words together."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlalign.scoring.caller import Caller, Rows, Tally
from rlalign.scoring.protocol import Reward, RewardError
from rlalign.types import RewardScores, Role, Scores, Unit

_log = logging.getLogger("rlalign")


class Scoring:
    """The rewards of one scorer, called one after the other in the order of the run file.

    ``replaceable``: it has a process of its own, and a call that hangs or fills it raises `Spent` if units worked there
    before. In a fresh process the reward's failure policy decides.
    """

    def __init__(self, rewards: Sequence[Reward], replaceable: bool = False) -> None:
        self._callers = {reward.config.name: Caller(reward, replaceable) for reward in rewards}
        assert len(self._callers) == len(rewards), "two rewards of one name"

    def score(self, images: Tensor, unit: Unit, roles: Collection[Role] = ("train",)) -> Scores:
        """Every reward whose role is due, and no other, but for those of recordings outside of rollouts.

        images: uint8 [P*G, ...], ordered by prompt.
        """
        assert images.dtype == torch.uint8 and len(images) == len(unit.prompts) * unit.samples
        rows = Rows(images, unit)
        new = unit.purpose != "rollout"
        due = {
            name: caller
            for name, caller in self._callers.items()
            if caller.config.role in roles and not (new and caller.of_recordings)
        }
        scores = {name: caller.score(rows) for name, caller in due.items()}
        sizes = [caller.config.min_group_size for caller in due.values() if caller.config.role == "train"]
        scores = _without_thin_groups(scores, unit, min(max(sizes, default=1), unit.samples))
        for name, reward in scores.items():
            due[name].tally.dropped += int((~reward.valid).sum())
        return Scores(scores)

    def stats(self) -> dict[str, float]:
        """Of every reward called since the last `stats`: seconds, failed tries, timeouts, pictures without a number."""
        metrics: dict[str, float] = {}
        for name, caller in self._callers.items():
            tally, caller.tally = caller.tally, Tally()
            if tally.calls:
                metrics[f"time/reward/{name}_s"] = tally.seconds
                metrics[f"runtime/reward/{name}/errors"] = float(tally.errors)
                metrics[f"runtime/reward/{name}/timeouts"] = float(tally.timeouts)
                metrics[f"runtime/reward/{name}/dropped"] = float(tally.dropped)
        return metrics


def require_valid_group(scores: Scores, step: int) -> None:
    """RewardError when a step has no valid sample left: such a run would go on for days and learn nothing."""
    if scores.training and not scores.valid.any():
        lost = [f"{name} {int((~r.valid).sum())} of {r.valid.numel()}" for name, r in scores.training.items()]
        raise RewardError(f"step {step} has no group with valid rewards; pictures lost: {', '.join(lost)}")


def _without_thin_groups(scores: dict[str, RewardScores], unit: Unit, least: int) -> dict[str, RewardScores]:
    """Groups in which fewer samples than `least` are valid in all train rewards become invalid in each of them."""
    training = Scores(scores).training
    if not training:
        return scores
    alive = Scores(training).valid.sum(1)  # [P]
    thin = (alive < least)[:, None]  # [P, 1]
    if thin.any():
        _log.warning("step %d: %d of %d groups are dropped for want of valid rewards", unit.step, thin.sum(), len(thin))
    return scores | {name: _without(reward, thin) for name, reward in training.items()}


def _without(reward: RewardScores, dropped: Tensor) -> RewardScores:
    """dropped: bool, broadcast against [P, G]"""
    valid = reward.valid & ~dropped
    return replace(reward, valid=valid, values=reward.values.where(valid, 0.0))
