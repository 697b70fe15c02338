"""The loop on analytic data, from run files, in process: what must not change the numbers does not."""

import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.build import build
from rlalign.checkpoint import load
from rlalign.config import resolve
from rlalign.loop import Stopped, train
from rlalign.pipeline import Pipeline, split
from rlalign.reporting.recorder import Recorder
from rlalign.reporting.watch import Watch, WatchConfig
from rlalign.rundir import open_run
from rlalign.types import Prompt, Unit
from rlalign.workers.sampler import Sampler

REWARD = """
def first(images, prompts):
    return images[:, 0, 0, 0].double() / 255
"""


class Silent:
    def evaluated(self, step: int, metrics: Any) -> None: ...

    def row(self, row: Any) -> None: ...


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "train.txt").write_text("\n".join(f"prompt {i}" for i in range(10)))
    (tmp_path / "heldout.txt").write_text("\n".join(f"other {i}" for i in range(4)))
    return tmp_path


def run(
    place: Path, name: str, stop_at: int | None = None, **changes: Any
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Runs (or goes on with) a run directory; its rows without clock readings, and its last weights."""
    tree: dict[str, Any] = {
        "model": {"family": "analytic", "means": [[0.0, 0.0], [2.0, 1.0]], "lora": None},
        "prompts": {"train": "train.txt", "heldout": "heldout.txt"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "num_steps": 5, "size": [1, 2], "micro_batch": 8},
        "rewards": [{"use": "reward.py:first"}],
        "algorithm": {"name": changes.pop("algorithm", "grpo")},
        "optimizer": {"lr": 1e-2},
        "evaluation": {"every": 2, "num_images": 16, "num_steps": 4},
        "checkpoint": {"every": 2},
        "reporting": {"tensorboard": False},
        "ema": {"decay": 0.9, "every": 1},
        "steps": 5,
    }
    for key, value in changes.items():
        block, _, inner = key.partition("__")
        tree[block] = {**tree.get(block, {}), inner: value} if inner else value
    config = resolve(tree, place, "test")
    parts, settings = build(config)
    steps_seen: list[int] = []

    def stop() -> bool:
        steps_seen.append(len(steps_seen))
        return stop_at is not None and len(steps_seen) == stop_at

    with open_run(place / name, config.tree(), config.hashed()) as current:
        recorder = Recorder(
            current, config.steps, config.checkpoint, Watch(WatchConfig(), None, 1e-15, ()), [], Silent()
        )
        try:
            train(parts, settings, recorder, stop)
        except Stopped:
            pass
        finally:
            recorder.close()
            for pool in (parts.samplers, parts.scorers, parts.learners):
                pool.close()
    rows = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    newest = sorted((place / name / "checkpoints").glob("step_*"))[-1]
    return [without_clock(row) for row in rows], load(newest).tensors


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not (k.startswith(("time/", "runtime/")) or k.endswith("_s"))}


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    weights = one[1].keys() == other[1].keys() and all(torch.equal(one[1][key], other[1][key]) for key in one[1])
    return one[0] == other[0] and weights


def test_a_run_has_one_row_a_step_and_learns(place: Path) -> None:
    rows, weights = run(place, "a", steps=12, optimizer__lr=5e-2)
    assert [row["step"] for row in rows] == list(range(12))
    assert rows[-1]["eval_final/reward/mean"] > rows[0]["eval/reward/mean"] + 0.02
    assert all(row["ratio/max_abs_dev"] == 0.0 and row["staleness"] == 0 for row in rows)
    assert [row["step"] for row in rows if "eval/reward/mean" in row] == [0, 2, 4, 6, 8, 10]
    assert [row["step"] for row in rows if "kl" in row] == [0, 2, 4, 6, 8, 10] and rows[10]["kl"] > rows[0]["kl"] > 0
    assert rows[0]["diversity"] == rows[0]["eval/diversity"] == 1.0
    assert any(key.startswith("learner/ema/") for key in weights)


@pytest.mark.parametrize("algorithm", ["grpo", "nft", "ddpo"])
@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_resumed_run_equals_the_unbroken_one(place: Path, algorithm: str, stop_at: int) -> None:
    unbroken = run(place, "unbroken", algorithm=algorithm)
    stopped = run(place, "broken", algorithm=algorithm, stop_at=stop_at)
    assert len(stopped[0]) == stop_at
    assert same(run(place, "broken", algorithm=algorithm), unbroken)


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
def test_the_number_of_workers_does_not_change_the_numbers(place: Path, algorithm: str) -> None:
    one = run(place, "one", algorithm=algorithm)
    assert same(run(place, "two", algorithm=algorithm, runtime__samplers=2, runtime__scorers=2), one)
    assert same(run(place, "four", algorithm=algorithm, runtime__samplers=4), one)


def test_evaluation_never_moves_the_run(place: Path) -> None:
    _, judged = run(place, "judged", evaluation__every=1, evaluation__weights="ema", algorithm="nft")
    _, alone = run(place, "alone", evaluation__every=0, algorithm="nft")
    assert all(torch.equal(judged[key], alone[key]) for key in alone)


@pytest.mark.parametrize("staleness", [1, 3])
def test_rows_are_never_staler_than_allowed(place: Path, staleness: int) -> None:
    rows, _ = run(place, "async", runtime__max_staleness=staleness)
    assert [row["staleness"] for row in rows] == [min(step, staleness) for step in range(5)]
    assert same(
        run(place, "again", runtime__max_staleness=staleness), run(place, "async2", runtime__max_staleness=staleness)
    )


def test_prolonging_a_finished_run_equals_a_long_one(place: Path) -> None:
    run(place, "short", steps=4)
    assert same(run(place, "short", steps=6), run(place, "long", steps=6))


def test_a_sampler_that_holds_something_else_is_named(place: Path) -> None:
    (place / "reward.py").write_text(REWARD)
    tree = {
        "model": {"family": "analytic", "means": [[0.0, 0.0]], "lora": None},
        "prompts": {"train": "train.txt", "heldout": "heldout.txt"},
        "rollout": {"num_steps": 4, "size": [1, 2]},
        "rewards": [{"use": "reward.py:first"}],
        "algorithm": "grpo",
        "runtime": {"samplers": 2},
    }
    parts, _ = build(resolve(tree, place, "test"))
    pool: Any = parts.samplers
    pool.workers[1].receive = lambda manifest, buckets: {"version": 0, "checksum": 0, "tensors": 0}
    with pytest.raises(RuntimeError, match="do not hold version 1"):
        parts.publisher.publish(parts.learners, parts.samplers, version=1)


def test_a_batch_split_over_samplers_is_the_same_batch(place: Path) -> None:
    tree = {
        "model": {"family": "analytic", "means": [[0.0, 0.0]], "lora": None},
        "prompts": {"train": "train.txt", "heldout": "heldout.txt"},
        "rollout": {"num_steps": 4, "size": [1, 2], "prompts_per_step": 6, "samples_per_prompt": 4, "micro_batch": 8},
        "rewards": [{"use": "reward.py:first"}],
        "algorithm": "grpo",
    }
    finals = []
    for samplers in (1, 2, 4):
        config = resolve({**tree, "runtime": {"samplers": samplers}}, place, "test")
        parts, settings = build(config)
        parts.publisher.publish(parts.learners, parts.samplers, version=0)
        batch = Pipeline(parts.samplers, parts.scorers, parts.prompts, settings.rollout, 0, range(1), 0).take()
        trajectories = parts.samplers.get(batch.trajectories)
        finals.append(
            [torch.cat([getattr(t, name) for t in trajectories]) for name in ("final", "x", "x_next", "log_probs")]
        )
    assert all(torch.equal(a, b) for other in finals[1:] for a, b in zip(finals[0], other, strict=True))


def test_a_batch_is_let_go_before_the_next_is_sampled(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, weakref.ref[Tensor]]] = []
    held: set[tuple[str, int, int]] = set()  # purpose and step of what is sampled, and an older step still held then
    sample = Sampler.sample

    def watched(self: Sampler, unit: Unit, *args: Any) -> Any:
        older = [step for step, final in made if (unit.purpose, step) != ("rollout", unit.step) and final() is not None]
        held.update((unit.purpose, unit.step, step) for step in older)
        trajectory, images = sample(self, unit, *args)
        if unit.purpose == "rollout":
            made.append((unit.step, weakref.ref(trajectory.final)))
        return trajectory, images

    monkeypatch.setattr(Sampler, "sample", watched)
    run(place, "a")
    assert {step for step, _ in made} == set(range(5)) and not held


def test_units_are_whole_groups_that_fill_micro_batches() -> None:
    units = split(0, tuple(Prompt(str(i)) for i in range(10)), samples=6, micro_batch=8)
    assert [unit.groups for unit in units] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
