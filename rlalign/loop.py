"""train(): prompts -> rollouts -> rewards -> advantages -> update -> publish -> record -> checkpoint."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import Field

from rlalign.algorithms.base import Algorithm
from rlalign.evaluation.heldout import EvaluationConfig, evaluate
from rlalign.pipeline import Pipeline, gather
from rlalign.policy import RolloutConfig, Variant
from rlalign.prompts import PromptSet
from rlalign.reporting.recorder import Recorder
from rlalign.runtime.pool import Pool
from rlalign.scoring import require_valid_group
from rlalign.settings import Settings
from rlalign.types import State


class LoopSettings(Settings):
    """What the loop itself must know."""

    steps: int = Field(ge=1)
    seed: int
    max_staleness: int = Field(ge=0)
    rollout: RolloutConfig
    evaluation: EvaluationConfig
    publish: tuple[Variant, ...]
    """Which weights the samplers need."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What the loop moves data between; built by ``rlalign.build``, or by hand in a notebook."""

    samplers: Pool
    scorers: Pool
    learners: Pool
    algorithm: Algorithm
    prompts: PromptSet
    heldout: PromptSet


class Stopped(Exception):
    """The run was asked to stop, and did so after writing a checkpoint."""


def train(parts: Parts, cfg: LoopSettings, recorder: Recorder, stop: Callable[[], bool] = lambda: False) -> None:
    """Goes on from the recorder's last checkpoint, or from step 0, to the end."""
    steps = range(restore(parts, recorder), cfg.steps)
    publish(parts, cfg, version=steps.start)
    pipeline = Pipeline(parts.samplers, parts.scorers, parts.prompts, cfg.rollout, cfg.seed, steps, cfg.max_staleness)

    if steps:
        judge(parts, cfg, recorder, steps.start)
    for step in steps:
        batch = pipeline.take()
        scores = gather(parts.scorers, batch)
        require_valid_group(scores, step)
        advantages = parts.algorithm.advantages(scores)
        (metrics,) = parts.learners.get(parts.learners.scatter("update", [(batch.trajectories, advantages, step)]))
        publish(parts, cfg, version=step + 1)
        recorder.step(step, scores, metrics, timings(parts))
        judge(parts, cfg, recorder, step + 1)
        last, stopping = step + 1 == cfg.steps, stop()
        recorder.commit(lambda: snapshot(parts), now=last or stopping)
        if stopping and not last:
            raise Stopped
        pipeline.release()


def publish(parts: Parts, cfg: LoopSettings, version: int) -> None:
    """Bytes go from the learner to the samplers; each must acknowledge the version, checksum and count it holds."""
    (weights, *_) = parts.learners.broadcast("publish", version, cfg.publish)
    acknowledged = parts.samplers.get(parts.samplers.broadcast("receive", weights))
    expected = acknowledged[0]
    if any(held != expected or held["version"] != version or held["tensors"] == 0 for held in acknowledged):
        raise RuntimeError(f"samplers do not hold version {version}: {acknowledged}")


def judge(parts: Parts, cfg: LoopSettings, recorder: Recorder, step: int) -> None:
    """Evaluates the weights before update ``step`` when that is due; never moves the run."""
    if cfg.evaluation.due(step, cfg.steps):
        started = time.perf_counter()
        result = evaluate(parts.samplers, parts.scorers, parts.heldout, cfg.evaluation, cfg.rollout)
        timings(parts)  # what evaluation took belongs to no step
        recorder.evaluation(step, result, time.perf_counter() - started)


def timings(parts: Parts) -> dict[str, float]:
    """Seconds that the workers were busy since the last call; publishing is what the samplers spent on receiving."""
    names = {"sample": "rollout", "score": "reward", "update": "update", "receive": "publish"}
    busy = parts.samplers.timings() | parts.scorers.timings() | parts.learners.timings()
    return {f"time/{name}_s": busy.get(method, 0.0) for method, name in names.items()}


def snapshot(parts: Parts) -> State:
    """All that the next step depends on."""
    (learner, *_) = parts.learners.get(parts.learners.broadcast("state_dict"))
    return State.join({"learner": learner, "algorithm": parts.algorithm.state_dict()})


def restore(parts: Parts, recorder: Recorder) -> int:
    """Loads the last valid checkpoint into the parts; the step to go on from."""
    step, state = recorder.restore()
    if state is not None:
        parts.learners.get(parts.learners.broadcast("load_state_dict", state.part("learner")))
        parts.algorithm.load_state_dict(state.part("algorithm"))
    return step
