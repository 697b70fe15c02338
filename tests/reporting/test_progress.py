"""The progress display: a bar on a terminal, single lines elsewhere."""

import io

from rich.console import Console

from rlalign.reporting.progress import Progress

ROW = {"reward/mean": 0.5, "ratio/max_abs_dev": 0.0, "images_per_s": 51.23}


def shown(terminal: bool, every_s: float) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with Progress(4, console=console, every_s=every_s) as progress:
        progress.evaluated(0, {"reward/mean": 0.33, "diversity": 1.0})
        for step in range(4):
            progress.row({"step": step, **ROW})
        progress.note("saved [as] it is")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_lines_are_few_and_plain() -> None:
    assert shown(False, every_s=60).splitlines() == [
        "held-out after 0 updates  reward 0.330  diversity 1.00",
        "step 1/4  reward 0.500  |ratio-1| 0  images/s 51.2",
        "step 4/4  reward 0.500  |ratio-1| 0  images/s 51.2",
        "saved [as] it is",
    ]
    assert len(shown(False, every_s=0).splitlines()) == 6


def test_a_terminal_has_a_bar() -> None:
    text = shown(True, every_s=0)
    assert "4/4" in text and "reward 0.500" in text and "held-out after 0 updates" in text and "━" in text
    assert "step 1/4" not in text
