"""metrics.jsonl: one row a step, whatever happened."""

import importlib.machinery
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlalign.reporting.alarms import AlarmLog, read_alarms
from rlalign.reporting.glossary import METRICS, explain
from rlalign.reporting.metrics import MetricsLog, column, read
from rlalign.reporting.sinks import ReportingConfig, TensorBoard, make_sinks
from tests.reporting.example import config, example_run, held_out, training


def write(path: Path, steps: range, **options: Any) -> None:
    with MetricsLog(path, steps.start, **options) as log:
        for step in steps:
            log.write({"step": step, "reward/mean": step / 7})


def test_one_row_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(5))
    assert read(path) == [{"step": step, "reward/mean": step / 7} for step in range(5)]
    with MetricsLog(path, 5) as log, pytest.raises(AssertionError, match="row 7 after 5 rows"):
        log.write({"step": 7})


def test_resuming_repeats_rows_without_gaps_or_doubles(tmp_path: Path) -> None:
    unbroken, resumed = tmp_path / "unbroken.jsonl", tmp_path / "resumed.jsonl"
    write(unbroken, range(10))
    write(resumed, range(8))
    with resumed.open("a") as file:
        file.write('{"step": 8, "rew')  # killed while it wrote
    write(resumed, range(6, 10))
    assert resumed.read_bytes() == unbroken.read_bytes()
    write(resumed, range(0, 10))
    assert resumed.read_bytes() == unbroken.read_bytes()


def test_missing_rows_are_not_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(3))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"metrics.jsonl is damaged: it has . rows, the checkpoint stands at step 5"
        ):
            MetricsLog(path, 5)
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("line", [b"nonsense", b"[]", b'{"step": 7}', b"\xff"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged: line 2 is not the row of step 1"):
        read(path)


def test_only_the_last_row_holds_the_final_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0, 2) as log:
        log.write({"step": 0})
        log.write({"step": 1, "eval_final/reward/mean": 0.5})
    MetricsLog(path, 2, 2).close()  # killed after its last checkpoint
    assert read(path)[1] == {"step": 1, "eval_final/reward/mean": 0.5}
    MetricsLog(path, 2, 4).close()  # prolonged
    assert read(path)[1] == {"step": 1}


def test_every_kind_of_number_is_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {
        "nan": math.nan,
        "inf": -math.inf,
        "none": None,
        "torch": torch.tensor(0.5),
        "numpy": np.float32(0.25),
        "n": 3,
    }
    with MetricsLog(path) as log:
        log.write({"step": 0, **row})  # pyright: ignore[reportArgumentType]
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {"step": 0, "nan": None, "inf": None, "none": None, "torch": 0.5, "numpy": 0.25, "n": 3}
    assert column(read(path), "nan") == {} and column(read(path), "torch") == {0: 0.5}


def test_alarms_of_repeated_steps_are_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "alarms.jsonl"
    assert read_alarms(path) == []
    for step in (1, 5):
        AlarmLog(path, step).write(step, "dead signal", "all groups score the same")
    AlarmLog(path, 5, 5)  # killed after its last checkpoint
    assert [alarm["step"] for alarm in read_alarms(path)] == [1, 5]
    AlarmLog(path, 5, 9)
    assert [alarm["step"] for alarm in read_alarms(path)] == [1]


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    for start in (0, 2):
        sink = TensorBoard(tmp_path / "events", start)
        for step in range(start, 4):
            sink.write(step, {"reward/mean": step + 10.0 * start})
        sink.close()
    shown = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("reward/mean")
    assert [(event.step, event.value) for event in shown] == [(0, 0.0), (1, 1.0), (2, 22.0), (3, 23.0)]


def test_wandb_is_optional_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = example_run(tmp_path / "run", done=2)
    settings = ReportingConfig(tensorboard=False, wandb="mine")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"wandb is not installed: pip install 'rlalign\[wandb\]'"):
        make_sinks(settings, run, config(2))
    calls: list[Any] = []
    fake = SimpleNamespace(log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("finished"))
    module = ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init = lambda **options: calls.append(options) or fake  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    (sink,) = make_sinks(settings, run, config(2))
    sink.write(3, {"kl": 0.5})
    sink.close()
    run.close()
    assert calls[0]["project"] == "mine" and calls[0]["resume"] == "allow" and calls[0]["id"].startswith("run-2")
    assert calls[1:] == [(3, {"kl": 0.5}), "finished"]


def test_every_metric_has_its_sentence() -> None:
    names = [*training(1, 2), *(f"eval{end}/{name}" for end in ("", "_final") for name in held_out(1, 2))]
    assert [name for name in names if explain(name) is None] == ["odd_metric"]
    assert explain("odd_metric", {"odd_metric": "Mine."}) == "Mine."
    assert explain("reward/jpeg/mean") == METRICS["reward/<name>/mean"]
    assert explain("eval/task/counting") == METRICS["eval/task/<task>"]
    assert explain("eval/recognised/length") == METRICS["eval/<detail>"]
