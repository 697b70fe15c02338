"""report: what a run did, as one HTML file."""

from pathlib import Path

from rlalign.commands.problems import in_preparation
from rlalign.reporting.grids import before_after
from rlalign.reporting.report import write_report
from rlalign.reporting.trace import write_trace
from rlalign.rundir import RunDir


def report(folder: Path, trace: bool = False, to: Path | None = None) -> int:
    """``to`` is where the trace goes."""
    with in_preparation():
        path = write_report(folder)
        pictures = before_after(RunDir(folder).samples)
        traced = write_trace(folder, to) if trace else None
    print(f"report       {path}")
    if pictures:
        print(f"pictures     {pictures}")
    if traced:
        print(f"trace        {traced}; open it in https://ui.perfetto.dev or chrome://tracing")
    return 0
