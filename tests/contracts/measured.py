"""What the tests of model families measured: printed at the end of their run, and written as JSON for the docs.

    note(record_property, "sd3", parity=2e-7)     # any number of times; the largest one counts

With RLALIGN_FAMILY_TABLE=PATH the numbers go to that file (`make families`), which docs/generate.py reads.
"""

import json
import os
import platform
from collections.abc import Callable, Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median

import pytest

MARK = "family "


def note(record_property: Callable[[str, object], None], family: str, **numbers: float) -> None:
    for name, value in numbers.items():
        record_property(f"{MARK}{family} {name}", float(value))


def largest(properties: Iterable[tuple[str, object]]) -> dict[str, dict[str, float]]:
    """The largest value of each number, by family."""
    found: dict[str, dict[str, float]] = {}
    for name, value in properties:
        if name.startswith(MARK) and isinstance(value, float):
            _, family, number = name.split(" ")
            own = found.setdefault(family, {})
            own[number] = max(own.get(number, 0.0), value)
    return {family: dict(sorted(found[family].items())) for family in sorted(found)}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    passed = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
    families = largest(one for report in passed for one in report.user_properties)
    lines = {family: int(numbers["lines"]) for family, numbers in families.items() if "lines" in numbers}
    if not lines:
        return
    terminalreporter.section("code lines of model families", sep="-")
    said = ", ".join(f"{family} {number}" for family, number in lines.items())
    terminalreporter.line(f"{said}; median {median(lines.values()):g}")
    path = os.environ.get("RLALIGN_FAMILY_TABLE")
    if path and terminalreporter.getreports("failed"):
        terminalreporter.line(f"{path} stays as it is, since tests failed")
    elif path:
        about = f"{date.today():%Y-%m-%d}, {platform.machine()} CPU, one thread, torch {version('torch')}"
        Path(path).write_text(json.dumps({"about": about, "families": families}, indent=1) + "\n")
        terminalreporter.line(f"written to {path}")
