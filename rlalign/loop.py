"""train(): prompts -> rollouts -> rewards -> advantages -> update -> publish -> record -> checkpoint."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field

from rlalign.algorithms.base import Algorithm
from rlalign.algorithms.regularise import weighed
from rlalign.checkpoint import Files
from rlalign.evaluation.heldout import EvaluationConfig, evaluate
from rlalign.pipeline import Pipeline, deal, gather
from rlalign.policy import RolloutConfig
from rlalign.prompts import PromptSet
from rlalign.reporting.recorder import Recorder
from rlalign.reporting.timing import Readings
from rlalign.runtime.pool import Pool, Runtime
from rlalign.runtime.weights import Publisher
from rlalign.settings import Settings
from rlalign.types import State


class LoopSettings(Settings):
    """What the loop itself must know."""

    steps: int = Field(ge=1)
    seed: int
    max_staleness: int = Field(ge=0)
    rollout: RolloutConfig
    evaluation: EvaluationConfig
    updates_per_step: int = Field(ge=1)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop moves data between; built by ``rlalign.build``, or by hand in a notebook."""

    samplers: Pool
    scorers: Pool
    learners: Pool
    publisher: Publisher
    algorithm: Algorithm
    prompts: PromptSet
    heldout: PromptSet
    runtime: Runtime

    @property
    def pools(self) -> tuple[Pool, ...]:
        return self.samplers, self.scorers, self.learners


class Stopped(Exception):
    """The run was asked to stop, and did so after writing a checkpoint."""


def train(parts: Parts, cfg: LoopSettings, recorder: Recorder, stop: Callable[[], bool] = lambda: False) -> None:
    """Goes on from the recorder's last checkpoint, or from step 0, to the end."""
    steps = range(restore(parts, recorder), cfg.steps)
    parts.publisher.publish(parts.learners, parts.samplers, version=steps.start)
    pipeline = Pipeline(parts.samplers, parts.scorers, parts.prompts, cfg.rollout, cfg.seed, steps, cfg.max_staleness)

    if steps:
        judge(parts, cfg, recorder, steps.start)
    for step in steps:
        batch = pipeline.take()
        scores = gather(parts.scorers, batch)
        advantages, told = weighed(parts.algorithm, scores)
        shares = deal(batch, advantages, scores.valid, parts.learners.size, cfg.updates_per_step)
        (metrics, *_) = parts.learners.get(parts.learners.scatter("update", shares))
        parts.publisher.publish(parts.learners, parts.samplers, version=step + 1)
        if cfg.evaluation.due(step, cfg.steps) and "kl" not in metrics:
            (metrics["kl"], *_) = parts.learners.get(parts.learners.broadcast("drift", batch.trajectories[:1]))
        del batch, shares  # what they refer to may go before others are sampled
        recorder.step(step, scores, metrics | told, Readings.of(parts.pools, scores.stats))
        judge(parts, cfg, recorder, step + 1)
        last, stopping = step + 1 == cfg.steps, stop()
        recorder.commit(lambda: snapshot(parts), partial(save_learners, parts), now=last or stopping)
        if stopping and not last:
            raise Stopped
    parts.publisher.settle(parts.samplers)


def judge(parts: Parts, cfg: LoopSettings, recorder: Recorder, step: int) -> None:
    """Evaluates the weights before update ``step`` when that is due; never moves the run."""
    if cfg.evaluation.due(step, cfg.steps):
        started = time.perf_counter()
        result = evaluate(parts.samplers, parts.scorers, parts.heldout, cfg.evaluation, cfg.rollout)
        recorder.evaluation(step, result, time.perf_counter() - started, Readings.of(parts.pools))


def snapshot(parts: Parts) -> State:
    """All that the next step depends on, but for what the learners write themselves."""
    return State.join({"algorithm": parts.algorithm.state_dict()})


def save_learners(parts: Parts, folder: Path) -> Files:
    """Every rank writes its files into the folder."""
    written = parts.learners.get(parts.learners.broadcast("save", folder))
    return {name: record for files in written for name, record in files.items()}


def restore(parts: Parts, recorder: Recorder) -> int:
    """Loads the last valid checkpoint into the parts; the step to go on from."""
    step, found = recorder.restore()
    if found is not None:
        path, state = found
        parts.learners.get(parts.learners.broadcast("load", path))
        parts.algorithm.load_state_dict(state.part("algorithm"))
    return step
