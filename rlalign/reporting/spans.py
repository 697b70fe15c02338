"""spans.jsonl: every call of every worker, and what the loop waited for, one JSON object a line; bounded in size.

Times are seconds since the epoch by the worker's clock. A resumed run goes on writing: steps that it repeats stand
there twice, as they happened.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlalign.files import in_words
from rlalign.types import Span

LIMIT = 32 * 2**20
"""Bytes at which the file becomes spans.1.jsonl, in place of an earlier one, and a new one is begun."""
NOTE = {"note": "earlier spans are in spans.1.jsonl; those before them are gone"}


class SpanLog:
    """Appends spans; lost are at most those of the step in which a machine went down."""

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path, self.limit = path, limit
        with in_words(f"write {path}"):
            self.file = path.open("ab")
            if torn(path):
                self.file.write(b"\n")

    def write(self, spans: Sequence[Span]) -> None:
        with in_words(f"write {self.path}"):
            self.file.write("".join(_line(asdict(span)) for span in spans).encode())
            self.file.flush()
            if self.file.tell() >= self.limit:
                self._begin_anew()

    def close(self) -> None:
        self.file.close()

    def _begin_anew(self) -> None:
        self.file.close()
        self.path.replace(earlier(self.path))
        self.file = self.path.open("ab")
        self.file.write(_line(NOTE).encode())


def earlier(path: Path) -> Path:
    """Where the part before the present file is."""
    return path.with_name(f"{path.stem}.1{path.suffix}")


def read_spans(path: Path) -> list[Span]:
    """All whole lines, the earlier part first; a line torn by a kill is passed over."""
    lines = [line for part in (earlier(path), path) if part.exists() for line in part.read_bytes().splitlines()]
    return [span for line in lines if (span := _span(line)) is not None]


def torn(path: Path) -> bool:
    """The last line has no end."""
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value) + "\n"


def _span(line: bytes) -> Span | None:
    try:
        value = json.loads(line)
        return Span(**{**value, "groups": tuple(value["groups"])})
    except (ValueError, TypeError, KeyError):
        return None
