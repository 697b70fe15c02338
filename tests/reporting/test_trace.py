"""The trace of a run: what Perfetto needs, and that samplers work while the learner does when they may run ahead."""

import json
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlalign.reporting.spans import read_spans
from rlalign.reporting.timing import kind, step_windows
from rlalign.reporting.trace import events, write_trace
from rlalign.rundir import RunDir
from rlalign.types import Span, Unit
from rlalign.workers.learner import Learner
from rlalign.workers.sampler import Sampler
from tests.reporting.example import example_run
from tests.runs import call, run_file, without_pages

STEPS = 4
PATIENCE_S = 20.0


def test_processes_are_roles_and_threads_are_workers() -> None:
    spans = [
        Span("learner-0", "update", 12.0, 14.0),
        Span("sampler-1", "sample", 10.5, 11.75, 3, (2, 3)),
        Span("sampler-0", "sample", 10.0, 11.0, 3, (0, 1)),
        Span("driver", "step", 10.0, 14.0, 3),
        Span("driver", "wait learner", 12.0, 14.0),
    ]
    found = events(spans, {3: 2})
    processes = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert list(processes.values()) == ["driver", "sampler", "learner"]
    assert list(threads.values()) == ["driver", "driver waits", "sampler-0", "sampler-1", "learner-0"]
    assert {name: processes[pid] for (pid, _), name in threads.items()}["sampler-1"] == "sampler"
    bars = [event for event in found if event["ph"] == "X"]
    assert [bar["ts"] for bar in bars] == sorted(bar["ts"] for bar in bars) and bars[0]["ts"] == 0
    (one,) = (bar for bar in bars if threads[bar["pid"], bar["tid"]] == "sampler-1")
    assert (one["name"], one["cat"], one["ts"], one["dur"]) == ("sample", "rollout", 500_000, 1_250_000)
    assert one["args"] == {"kind": "rollout", "step": 3, "groups": [2, 3], "version": 2}


def test_a_run_without_spans_says_so(tmp_path: Path) -> None:
    example_run(tmp_path / "run").close()
    with pytest.raises(ValueError, match="has no spans yet"):
        write_trace(tmp_path / "run")
    with pytest.raises(ValueError, match="there is no run"):
        write_trace(tmp_path / "nowhere")


class Rendezvous:
    """Update k waits until a rollout of step k + 1 has begun, and that rollout until the update has."""

    def __init__(self) -> None:
        self.rollouts, self.updates = defaultdict(threading.Event), defaultdict(threading.Event)
        self.missed: list[int] = []

    def sampling(self, unit: Unit) -> None:
        if unit.purpose == "rollout" and unit.step > 0:
            self.rollouts[unit.step].set()
            self.await_(self.updates[unit.step - 1], unit.step)

    def updating(self, step: int) -> None:
        self.updates[step].set()
        if step + 1 < STEPS:
            self.await_(self.rollouts[step + 1], step)

    def await_(self, event: threading.Event, step: int) -> None:
        if not event.wait(PATIENCE_S):
            self.missed.append(step)


def before(method: Callable[..., Any], deed: Callable[..., None]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **more: Any) -> Any:
        deed(*args)
        return method(self, *args, **more)

    return wrapped


@pytest.fixture
def overlapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A run with two samplers that may be one version behind; it would miss its meetings without overlap."""
    run_file(tmp_path)
    without_pages(monkeypatch)
    monkeypatch.chdir(tmp_path)
    meeting = Rendezvous()
    monkeypatch.setattr(Sampler, "sample", before(Sampler.sample, lambda unit, *_: meeting.sampling(unit)))
    monkeypatch.setattr(Learner, "update", before(Learner.update, lambda *args: meeting.updating(args[2])))
    ahead = ["runtime.max_staleness=1", "runtime.samplers=2", "evaluation.every=0"]
    assert call(capsys, "train", "run.yaml", "--steps", str(STEPS), *ahead).code == 0
    assert meeting.missed == []
    return tmp_path / "runs" / "run"


def test_with_staleness_rollouts_and_updates_overlap(overlapped: Path) -> None:
    spans = read_spans(RunDir(overlapped).spans)
    updates = sorted((span for span in spans if kind(span) == "update"), key=lambda span: span.start)
    assert len(updates) == len(step_windows(spans)) == STEPS
    for step, update in enumerate(updates[:-1]):
        ahead = [span for span in spans if kind(span) == "rollout" and span.step == step + 1]
        assert any(span.start < update.end and update.start < span.end for span in ahead)
    assert {span.worker for span in spans if kind(span) == "rollout"} == {"sampler-0", "sampler-1"}
    path = write_trace(overlapped)
    trace = json.loads(path.read_text())["traceEvents"]
    rollouts = [event["args"] for event in trace if event.get("cat") == "rollout"]
    assert path.name == "trace.json"
    assert {(args["step"], args["version"]) for args in rollouts} == {(0, 0), (1, 0), (2, 1), (3, 2)}


def test_the_rows_say_how_busy_everyone_was(overlapped: Path) -> None:
    row = json.loads((overlapped / "metrics.jsonl").read_text().splitlines()[1])
    assert all(0 < row[f"runtime/busy/{role}"] <= 1 for role in ("sampler", "learner"))
    assert row["runtime/workers/sampler"] == 2 and row["runtime/busy/sampler/min"] <= row["runtime/busy/sampler/max"]
    assert 0 < row["time/driver_s"] < row["time/step_s"]
    seconds = sum(span.end - span.start for span in read_spans(RunDir(overlapped).spans) if kind(span) == "update")
    rows = [json.loads(line) for line in (overlapped / "metrics.jsonl").read_text().splitlines()]
    assert sum(row["time/update_s"] for row in rows) == pytest.approx(seconds)


def test_the_command_writes_the_trace_where_it_is_asked_to(
    overlapped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = call(capsys, "report", "runs/run", "--trace")
    assert done.code == 0 and "runs/run/trace.json" in done.out and "perfetto" in done.out
    assert call(capsys, "report", "runs/run", "--to", "mine.json").code == 0
    assert (tmp_path / "mine.json").read_text() == (overlapped / "trace.json").read_text()
    assert "Where the time goes" in (overlapped / "report.html").read_text()
