"""How many seeds; where RLALIGN_EXACT_SEEDS says how many, also what was measured, at the end of the run, with
RLALIGN_EXACT_TABLE as a table in that file, and with RLALIGN_EXACT_JSON as data for the pages in that one.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch

SEEDS = int(os.environ.get("RLALIGN_EXACT_SEEDS", "1"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Five seeds are one decision of one test, and take five times as long."""
    for item in items:
        if SEEDS > 1 and "tests/exact/" in item.path.as_posix():
            item.add_marker(pytest.mark.timeout(180 * SEEDS))


@pytest.fixture(scope="session")
def seeds() -> tuple[int, ...]:
    """Fixed, so that a test decides the same way every time: 0 alone, or 0 to RLALIGN_EXACT_SEEDS - 1."""
    return tuple(range(SEEDS))


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """measured(name=value, ...) puts numbers into the table."""

    def note(**numbers: float) -> None:
        for name, value in numbers.items():
            record_property(f"exact {name}", f"{value:.4g}")

    return note


Proof = Callable[..., None]


@pytest.fixture
def proves(record_property: Callable[[str, object], None]) -> Proof:
    """proves("grpo", "T2", "Flow-SDE 0.7", "distance", 0.013, "below 3 %", percent=True) puts a row on the pages.

    One or more algorithms, or papers' presets; the rung of the ladder; what was trained; what was measured of it, one
    number a seed or one of all; and what it had to be. Calls that differ in the number alone make one row.
    """

    def note(
        algorithms: str | tuple[str, ...],
        rung: str,
        case: str,
        quantity: str,
        value: float,
        bound: str,
        percent: bool = False,
    ) -> None:
        names = (algorithms,) if isinstance(algorithms, str) else algorithms
        for name in names:
            row = {"algorithm": name, "rung": rung, "case": case, "quantity": quantity, "bound": bound}
            record_property("proof", json.dumps({**row, "percent": percent, "value": float(f"{value:.4g}")}))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "RLALIGN_EXACT_SEEDS" not in os.environ:
        return
    rows = [
        (test_of(report), outcome, report.duration, by_name(report.user_properties))
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" and "tests/exact/" in report.nodeid
    ]
    if not rows:
        return
    terminalreporter.section(f"exact ladder, {SEEDS} seed{'s' * (SEEDS > 1)}", sep="-")
    for test, outcome, seconds, numbers in sorted(rows):
        if numbers:
            said = "  ".join(f"{name} {' '.join(values)}" for name, values in numbers.items())
            terminalreporter.line(f"{outcome} {seconds:5.1f} s  {test}: {said}")
    if path := os.environ.get("RLALIGN_EXACT_TABLE"):
        Path(path).write_text(table(sorted(rows)))
        terminalreporter.line(f"written to {path}")
    if path := os.environ.get("RLALIGN_EXACT_JSON"):
        noted = [
            (test_of(report), outcome, [str(value) for name, value in report.user_properties if name == "proof"])
            for outcome, when in (("passed", "call"), ("failed", "call"), ("error", "setup"))
            for report in sorted(terminalreporter.getreports(outcome), key=lambda report: report.nodeid)
            if report.when == when and "tests/exact/" in report.nodeid
        ]
        numbers = {
            test: {key: " ".join(values) for key, values in told.items()} for test, _, _, told in sorted(rows) if told
        }
        where = {"date": f"{date.today():%d %B %Y}", "machine": machine(), "torch": torch.__version__, "seeds": SEEDS}
        Path(path).write_text(json.dumps({**where, **proofs(noted), "measured": numbers}, indent=1) + "\n")
        terminalreporter.line(f"written to {path}")


def test_of(report: pytest.TestReport) -> str:
    return report.nodeid.split("exact/")[-1]


def proofs(noted: Sequence[tuple[str, str, Sequence[str]]]) -> dict[str, Any]:
    """Rows for the pages, from tests, how they ended and what ``proves`` noted in them.

    A row is as good as the worst test that feeds it; tests that failed before they had any to feed stand by themselves.
    """
    rows: dict[str, dict[str, Any]] = {}
    for _, outcome, notes in noted:
        for note in map(json.loads, notes):
            value = note.pop("value")
            row = rows.setdefault(json.dumps(note), {**note, "outcome": "passed", "values": []})
            row["values"].append(value)
            row["outcome"] = row["outcome"] if outcome == "passed" else "failed"
    return {
        "rows": sorted(rows.values(), key=lambda row: (int(row["rung"][1:]), row["algorithm"])),
        "without_row": [test for test, outcome, notes in noted if outcome != "passed" and not notes],
    }


Row = tuple[str, str, float, dict[str, list[str]]]
"""Test, outcome, seconds, and what it measured: one value a seed, or one for all of them."""


def by_name(properties: Iterable[tuple[str, object]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in properties:
        if name.startswith("exact "):
            found.setdefault(name.removeprefix("exact "), []).append(str(value))
    return found


def table(rows: Sequence[Row]) -> str:
    """In Markdown. Tests that measure nothing, but decide, are counted alone."""
    measured, seconds = [row for row in rows if row[3]], sum(row[2] for row in rows)
    failed = sum(row[1] == "failed" for row in rows)
    lines = [
        f"# The exact ladder, {SEEDS} seed{'s' * (SEEDS > 1)}",
        "",
        f"`make exact`, {date.today():%d %B %Y}, {machine()}, torch {torch.__version__}: {len(rows) - failed} tests "
        f"passed, {failed} failed, {seconds:.0f} seconds of tests in all. What the numbers mean: `docs/exact.md`. "
        "Several values are those of the seeds, in order.",
        "",
        "| test | outcome | seconds | measured |",
        "|---|---|---|---|",
    ]
    for test, outcome, took, numbers in measured:
        said = " · ".join(f"{name} {', '.join(values)}" for name, values in numbers.items())
        lines.append(f"| `{test.replace('|', '/')}` | {outcome} | {took:.1f} | {said} |")
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Name of the processor, where the system tells it."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.machine()
