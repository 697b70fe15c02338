"""How many seeds; where the environment says how many, also a table of what was measured at the end of the run."""

import os
from collections.abc import Callable

import pytest

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if "RLALIGN_EXACT_SEEDS" not in os.environ:
        return
    lines: list[str] = []
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            found = [(key, value) for key, value in getattr(report, "user_properties", ()) if key.startswith("exact ")]
            if found:
                numbers = "  ".join(f"{key.removeprefix('exact ')} {value}" for key, value in found)
                lines.append(f"{outcome} {report.duration:5.1f} s  {report.nodeid.split('exact/')[-1]}: {numbers}")
    if lines:
        terminalreporter.section(f"exact ladder, {SEEDS} seed{'s' * (SEEDS > 1)}", sep="-")
        for line in sorted(lines):
            terminalreporter.line(line)
