"""Says at the end of a run which reference cases were decided and which were not, by name."""

from collections import defaultdict

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts: dict[str, int] = defaultdict(int)
    left_out: dict[tuple[str, str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            properties = dict(getattr(report, "user_properties", ()))
            if "reference" not in properties:
                continue
            name, kernel, source = properties["reference"]
            status, reason = properties.get("left out", (outcome, ""))
            counts[status] += 1
            if "left out" in properties:
                left_out[status, kernel, reason][source].add(name)
    if not counts:
        return
    terminalreporter.section("reference cases", sep="-")
    tally = ", ".join(f"{number} {status}" for status, number in counts.items())
    terminalreporter.line(f"{tally} (each case twice: float64, float32)")
    for (status, kernel, reason), sources in sorted(left_out.items()):
        number = sum(len(names) for names in sources.values())
        why = f" ({reason})" if reason else ""
        cases = f"{number} case{'s' * (number > 1)}"
        terminalreporter.line(f"{status}: {kernel} ({', '.join(sorted(sources))}; {cases}){why}")
