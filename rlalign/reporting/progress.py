"""How a run is going, on the terminal: a bar where there is one, single lines where the output goes into a file."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

STEP = {
    "reward/mean": ("reward", ".3f"),
    "ratio/max_abs_dev": ("|ratio-1|", ".2g"),
    "images_per_s": ("images/s", ".1f"),
}
EVALUATION = {"reward/mean": ("reward", ".3f"), "diversity": ("diversity", ".2f")}


class Progress:
    """The recorder's display; a context manager around the loop."""

    def __init__(self, steps: int, start: int = 0, console: Console | None = None, every_s: float = 2.0) -> None:
        """``every_s``: without a terminal, seconds between two lines; the last step always gets one."""
        self.steps, self.every_s = steps, every_s
        self.console = console or Console(stderr=True)
        self.last_line = float("-inf")
        self.bar = Bar(
            TextColumn("[bold]step"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("step", total=steps, completed=start, numbers="")

    def row(self, row: Mapping[str, float]) -> None:
        """A step is done: its row, as it goes to metrics.jsonl."""
        done, words = int(row["step"]) + 1, in_short(row, STEP)
        self.bar.update(self.task, completed=done, numbers=words)
        due = done == self.steps or time.monotonic() - self.last_line >= self.every_s
        if due and not self.console.is_terminal:
            self.last_line = time.monotonic()
            self.note(f"step {done}/{self.steps}  {words}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out numbers of the weights after ``step`` updates, without eval/ in front of their names."""
        self.note(f"held-out after {step} updates  {in_short(metrics, EVALUATION)}")

    def note(self, text: str) -> None:
        """A line of its own, above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def in_short(metrics: Mapping[str, float], shown: Mapping[str, tuple[str, str]]) -> str:
    """The few numbers to follow a run by."""
    return "  ".join(f"{label} {metrics[name]:{form}}" for name, (label, form) in shown.items() if name in metrics)
