"""trace.json: a run's spans as Chrome's trace format, for chrome://tracing and https://ui.perfetto.dev.

A process there is a role, a thread one of its workers, a bar one call. Waits of the driver have a thread of their own.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rlalign.files import write_atomically
from rlalign.reporting.metrics import column, read
from rlalign.reporting.spans import read_spans
from rlalign.reporting.timing import WAITING, in_order, kind, role
from rlalign.rundir import RunDir
from rlalign.runtime.pool import DRIVER
from rlalign.types import Span

WAITS = f"{DRIVER} waits"

Event = dict[str, Any]


def write_trace(run_dir: Path, path: Path | None = None) -> Path:
    """Writes RUN/trace.json, or ``path``; ValueError when there is nothing to show."""
    run = RunDir(run_dir)
    run.read_info()
    spans = read_spans(run.spans)
    if not spans:
        raise ValueError(f"{run_dir} has no spans yet: {run.spans.name} comes with the first step")
    staleness = column(read(run.metrics), "staleness") if run.metrics.exists() else {}
    versions = {step: step - int(value) for step, value in staleness.items()}
    path = path or run.trace
    write_atomically(path, json.dumps({"traceEvents": events(spans, versions), "displayTimeUnit": "ms"}).encode())
    return path


def events(spans: Sequence[Span], versions: Mapping[int, int]) -> list[Event]:
    """Times begin at the first span; ``versions`` are the (oldest) weights that each step's rollouts had."""
    zero = min(span.start for span in spans)
    pids = {name: pid for pid, name in enumerate(sorted({role(span.worker) for span in spans}, key=in_order), 1)}
    threads = sorted({(in_order(span.worker), _thread(span), pids[role(span.worker)]) for span in spans})
    tids = {name: tid for tid, (_, name, _) in enumerate(threads, 1)}
    names = [_named("process", pid, 0, name, pid) for name, pid in pids.items()]
    names += [_named("thread", pid, tids[name], name, tids[name]) for _, name, pid in threads]
    bars = [
        {
            "ph": "X",
            "name": span.method,
            "cat": kind(span),
            "ts": round((span.start - zero) * 1e6),
            "dur": round((span.end - zero) * 1e6) - round((span.start - zero) * 1e6),
            "pid": pids[role(span.worker)],
            "tid": tids[_thread(span)],
            "args": _args(span, versions),
        }
        for span in sorted(spans, key=lambda span: span.start)
    ]
    return [*chain.from_iterable(names), *bars]


def _thread(span: Span) -> str:
    return WAITS if kind(span) == WAITING else span.worker


def _args(span: Span, versions: Mapping[int, int]) -> dict[str, Any]:
    known: dict[str, Any] = {"kind": kind(span)}
    if span.step is not None:
        known["step"] = span.step
    if span.groups:
        known["groups"] = list(span.groups)
    if kind(span) == "rollout" and span.step is not None and span.step in versions:
        known["version"] = versions[span.step]
    return known


def _named(what: str, pid: int, tid: int, name: str, place: int) -> list[Event]:
    """The events that give a process or a thread its name and its place from the top."""
    where = {"ph": "M", "pid": pid, "tid": tid}
    return [
        {**where, "name": f"{what}_name", "args": {"name": name}},
        {**where, "name": f"{what}_sort_index", "args": {"sort_index": place}},
    ]
