"""alarms.jsonl: what went wrong or looks wrong, by step, in words. One line each, also given to the logger."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from rlalign.files import in_words, write_atomically

logger = logging.getLogger(__name__)


class AlarmLog:
    """Appends alarms; a resumed run forgets those of the steps that it repeats."""

    def __init__(self, path: Path, start: int = 0, steps: int | None = None) -> None:
        """Goes on at step ``start`` of ``steps``: where nothing is left to do, nothing is repeated or forgotten."""
        self.path = path
        kept = [alarm for alarm in read_alarms(path) if alarm["step"] < start or start == steps]
        write_atomically(path, "".join(json.dumps(alarm) + "\n" for alarm in kept).encode())

    def write(self, step: int, name: str, message: str) -> None:
        """``name`` says which alarm, ``message`` what happened, the likely causes and what to check next."""
        logger.warning("step %d: %s: %s", step, name, message)
        with in_words(f"write {self.path}"), self.path.open("a") as file:
            file.write(json.dumps({"step": step, "name": name, "message": message}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_alarms(path: Path) -> list[dict[str, Any]]:
    """All whole lines, none when there is no file yet."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise ValueError(f"{path} is damaged: it is not one JSON object a line") from None
