"""The recorder: what the loop tells of a step becomes a row, pictures, alarms and checkpoints of the run directory."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from rlalign import checkpoint
from rlalign.algorithms.advantages import flat
from rlalign.checkpoint import CheckpointConfig
from rlalign.confighash import checkpoint_hash
from rlalign.evaluation.heldout import Evaluation
from rlalign.reporting.alarms import AlarmLog
from rlalign.reporting.grids import save_grid
from rlalign.reporting.metrics import MetricsLog
from rlalign.reporting.spans import SpanLog
from rlalign.reporting.timing import Readings, step_times
from rlalign.reporting.watch import Watch
from rlalign.rundir import Run
from rlalign.runtime.pool import DRIVER
from rlalign.types import Scores, Span, State


class Display(Protocol):
    """Whoever shows the run to a person while it goes on."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def row(self, row: Mapping[str, float]) -> None: ...


@dataclass(slots=True)
class Base:
    """What the untouched model measured, to compare with; part of the checkpoint."""

    distance: float | None = None  # of the first step's groups
    heldout_distance: float | None = None


class Recorder:
    """Writes one run directory, from the step where its last checkpoint stands."""

    def __init__(
        self, run: Run, steps: int, config: CheckpointConfig, watch: Watch, sinks: list[Any], display: Display
    ) -> None:
        self.run, self.steps, self.config, self.watch, self.display = run, steps, config, watch, display
        self.metrics = MetricsLog(run.files.metrics, run.step, steps, sinks)
        self.alarms = AlarmLog(run.files.alarms, run.step, steps)
        self.spans = SpanLog(run.files.spans)
        self.base = Base()
        self.scores: dict[int, float] = {}  # the metric that chooses the best checkpoint, by step
        self.evaluated: dict[str, float] = {}  # waits for the row that it belongs to
        self.row: dict[str, float] = {}
        self.images = 0
        self.started = time.perf_counter()

    def restore(self) -> tuple[int, tuple[Path, State] | None]:
        """The step to go on from; the checkpoint after the updates before it, and its state without the learners'."""
        if self.run.checkpoint is None:
            return 0, None
        state = checkpoint.load(self.run.checkpoint, without=checkpoint.LEARNER)
        mine = state.values["recorder"]
        self.base, self.images = Base(**mine["base"]), mine["images"]
        self.scores = {int(step): value for step, value in mine["scores"].items()}
        return self.run.step, (self.run.checkpoint.absolute(), state)

    def evaluation(self, step: int, result: Evaluation, seconds: float, readings: Readings) -> None:
        """Of the weights before update ``step``; the row of that step, or the last, will hold it."""
        now = time.time()
        self.spans.write([*readings.spans, Span(DRIVER, "evaluation", now - seconds, now, step)])
        metrics = dict(result.metrics)
        if self.base.heldout_distance is None:
            self.base.heldout_distance = metrics["distance"]
        metrics["diversity"] = metrics["distance"] / max(self.base.heldout_distance, 1e-12)
        save_grid(result.pictures, result.captions, self.run.files.sample(step))
        self.display.evaluated(step, metrics)
        self._alarm(step, self.watch.evaluation(metrics))
        if step == self.steps:
            self.row |= {f"eval_final/{name}": value for name, value in metrics.items()}
            self.row["time/eval_final_s"] = seconds
        self.evaluated = {f"eval/{name}": value for name, value in metrics.items()} | {"time/eval_s": seconds}
        self.started = time.perf_counter()  # the seconds of a step are those of training

    def step(self, step: int, scores: Scores, metrics: Mapping[str, float], readings: Readings) -> None:
        """All that is known of a step but a final evaluation."""
        elapsed, now = time.perf_counter() - self.started, time.time()
        window = (now - elapsed, now)
        self.images += scores.total.numel()
        self.row = {
            "step": step,
            **reward_metrics(scores),
            **self._diversity(scores),
            **metrics,
            **self.evaluated,
            **readings.counts,
            **step_times(readings, window),
            "images": self.images,
            "images_per_s": scores.total.numel() / elapsed,
            "time/step_s": elapsed,
        }
        self.evaluated = {}
        self._alarm(step, self.watch.step(self.row))
        self.display.row(self.row)
        self.spans.write([*readings.spans, Span(DRIVER, "step", *window, step)])

    def commit(self, state: Callable[[], State], others: Callable[[Path], checkpoint.Files], now: bool) -> None:
        """Writes the row; and a checkpoint when one is due, or ``now``: the state after it, and what others write."""
        begun, step = time.time(), int(self.row["step"])
        self.metrics.write(self.row)
        if self.config.keep_best in self.row:
            self.scores[step] = self.row[self.config.keep_best]
        if now or (step + 1) % self.config.every == 0:
            self._save(step + 1, state(), others)
        self.spans.write([Span(DRIVER, "commit", begun, time.time(), step)])
        self.started = time.perf_counter()

    def close(self) -> None:
        self.metrics.close()
        self.spans.close()

    def _save(self, done: int, state: State, others: Callable[[Path], checkpoint.Files]) -> None:
        scores = {str(step): value for step, value in self.scores.items()}
        mine = {"base": asdict(self.base), "images": self.images, "scores": scores}
        whole = State(state.tensors, {**state.values, "recorder": mine})
        config_hash, keep = checkpoint_hash(self.run.info.hashed), self.config.keep
        checkpoint.save(self.run.files.checkpoints, done, whole, keep, config_hash, self.scores, others)
        self.run.mark("running", done)

    def _diversity(self, scores: Scores) -> dict[str, float]:
        """Of this step's groups, relative to the groups of the first step."""
        assert scores.distance is not None
        distance = float(scores.distance.mean())
        if self.base.distance is None:
            self.base.distance = distance
        return {"diversity": distance / max(self.base.distance, 1e-12)}

    def _alarm(self, step: int, alarms: Mapping[str, str]) -> None:
        for name, message in alarms.items():
            self.alarms.write(step, name, message)


def reward_metrics(scores: Scores) -> dict[str, float]:
    """Means and spreads of the training rewards over the samples that have one."""
    total, valid = scores.total, scores.valid
    spread = torch.where(valid, total, total.new_tensor(torch.nan))
    group_std = (spread - spread.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()  # [P]
    metrics = {
        "reward/mean": float(total[valid].mean()),
        "reward/std": float(total[valid].std(correction=0)),
        "reward/group_std": float(group_std.nanmean()),
        "reward/zero_std_groups": float(flat(total, valid).float().mean()),
        "reward/valid": float(valid.float().mean()),
    }
    for name, reward in scores.training.items():
        metrics[f"reward/{name}/mean"] = float(reward.values[reward.valid].mean())
    return metrics
