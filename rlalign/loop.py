"""train(): prompts -> rollouts -> rewards -> advantages -> update -> publish -> record -> checkpoint."""

import time
from collections import Counter
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
        advantages = parts.algorithm.advantages(scores)
        share = (batch.trajectories, advantages, step, scores.valid)
        (metrics,) = parts.learners.get(parts.learners.scatter("update", [share]))
        publish(parts, cfg, version=step + 1)
        if cfg.evaluation.due(step, cfg.steps) and "kl" not in metrics:
            (metrics["kl"],) = parts.learners.get(parts.learners.scatter("drift", [(batch.trajectories,)]))
        recorder.step(step, scores, metrics, readings(parts))
        judge(parts, cfg, recorder, step + 1)
        last, stopping = step + 1 == cfg.steps, stop()
        recorder.commit(lambda: snapshot(parts), now=last or stopping)
        if stopping and not last:
            raise Stopped
        pipeline.release()


def publish(parts: Parts, cfg: LoopSettings, version: int) -> None:
    """Bytes go from the learner to the samplers; each must acknowledge the version, checksum and count it holds."""
    (weights, *_) = parts.learners.broadcast("publish", version, cfg.publish)
    acknowledged = parts.samplers.get(parts.samplers.hold("receive", weights))
    expected = acknowledged[0]
    if any(held != expected or held["version"] != version or held["tensors"] == 0 for held in acknowledged):
        raise RuntimeError(f"samplers do not hold version {version}: {acknowledged}")


def judge(parts: Parts, cfg: LoopSettings, recorder: Recorder, step: int) -> None:
    """Evaluates the weights before update ``step`` when that is due; never moves the run."""
    if cfg.evaluation.due(step, cfg.steps):
        started = time.perf_counter()
        result = evaluate(parts.samplers, parts.scorers, parts.heldout, cfg.evaluation, cfg.rollout)
        readings(parts)  # what evaluation took belongs to no step
        recorder.evaluation(step, result, time.perf_counter() - started)


def readings(parts: Parts) -> dict[str, float]:
    """Since the last call: seconds that workers were busy, and every reward's seconds, errors, timeouts and drops."""
    names = {"rollout": ["sample"], "reward": ["score"], "update": ["update"], "publish": ["publish", "receive"]}
    busy: Counter[str] = Counter()
    for span in [*parts.samplers.spans(), *parts.scorers.spans(), *parts.learners.spans()]:
        busy[span.method] += span.end - span.start
    total = Counter({f"time/{name}_s": sum(busy[m] for m in methods) for name, methods in names.items()})
    for stats in parts.scorers.get(parts.scorers.broadcast("stats")):
        total.update(stats)
    return dict(total)


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
