"""metrics.jsonl: exactly one JSON object a step, 0..N-1, whatever was interrupted in between.

A row is flat: ``step``, then numbers by the names that ``glossary`` explains. ``eval/*`` in row k is of the weights
before update k, so row 0 holds the base; the last row also holds ``eval_final/*``. NaN and infinities become null.
The file is the record; TensorBoard and others (``sinks``) are copies of the same stream.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from rlalign.files import in_words, write_atomically

Row = dict[str, Any]
FINAL = "eval_final/"


class Sink(Protocol):
    """Something else that wants every row."""

    def write(self, step: int, row: Mapping[str, float]) -> None:
        """The finite numbers of a row."""
        ...

    def close(self) -> None: ...


class MetricsLog:
    """Appends rows; on the disk when ``write`` returns, hence before the checkpoint that counts on them."""

    def __init__(self, path: Path, start: int = 0, steps: int | None = None, sinks: Sequence[Sink] = ()) -> None:
        """Goes on at step ``start``: later rows and a torn last line are cut off, so nothing is missing or doubled.

        ``steps`` is where the run will end: if it lies behind ``start``, an earlier end's ``eval_final`` goes too.
        """
        self.path, self.sinks = path, sinks
        self.next = start
        rows = read(path)[:start] if path.exists() else []
        if len(rows) < start:
            raise ValueError(f"{path} is damaged: it has {len(rows)} rows, the checkpoint stands at step {start}")
        if rows and steps is not None and steps > start:
            rows[-1] = {name: value for name, value in rows[-1].items() if not name.startswith(FINAL)}
        write_atomically(path, "".join(map(_line, rows)).encode())
        self.file = path.open("ab")

    def write(self, row: Mapping[str, float | None]) -> None:
        """The row of step ``row["step"]``, which must be the next one."""
        assert row["step"] == self.next, f"row {row['step']} after {self.next} rows"
        plain = {"step": self.next, **{name: _plain(value) for name, value in row.items() if name != "step"}}
        with in_words(f"write {self.path}"):
            self.file.write(_line(plain).encode())
            self.file.flush()
            os.fsync(self.file.fileno())
        numbers = {name: value for name, value in plain.items() if name != "step" and value is not None}
        for sink in self.sinks:
            sink.write(self.next, numbers)
        self.next += 1

    def close(self) -> None:
        self.file.close()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(path: Path) -> list[Row]:
    """All whole rows; a torn last line (a kill while it was written) does not count. ValueError names a broken line."""
    with in_words(f"read {path}"):
        lines = path.read_bytes().split(b"\n")[:-1]  # what stands after the last line break is torn
    return [_parsed(path, number, line) for number, line in enumerate(lines)]


def column(rows: Sequence[Row], name: str) -> dict[int, float]:
    """One metric by step, where it has a value."""
    return {row["step"]: row[name] for row in rows if row.get(name) is not None}


def _parsed(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or row.get("step") != number:
        raise ValueError(f"{path} is damaged: line {number + 1} is not the row of step {number}")
    return row


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _plain(value: float | None) -> float | None:
    """A number that JSON has, from Python, NumPy or torch."""
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
