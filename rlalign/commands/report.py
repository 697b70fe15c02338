"""report: what a run did, as one HTML file."""

from pathlib import Path

from rlalign.commands.problems import in_preparation
from rlalign.reporting.grids import before_after
from rlalign.reporting.report import write_report
from rlalign.rundir import RunDir


def report(folder: Path) -> int:
    with in_preparation():
        path = write_report(folder)
        pictures = before_after(RunDir(folder).samples)
    print(f"report       {path}")
    if pictures:
        print(f"pictures     {pictures}")
    return 0
