"""Faults at chosen moments of a run that goes on in this thread."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path


def in_background(when: Callable[[], bool], deed: Callable[[], object]) -> threading.Thread:
    def wait() -> None:
        while not when():
            time.sleep(0.002)
        deed()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill(role: str, index: int, run: Path, when: Callable[[], bool], number: int) -> threading.Thread:
    """Sends a signal to a worker of the run once ``when`` holds."""

    def deed() -> None:
        for worker in json.loads((run / "workers.json").read_text()):
            if (worker["role"], worker["index"]) == (role, index):
                os.kill(worker["pid"], number)

    return in_background(lambda: (run / "workers.json").exists() and when(), deed)


def rows(run: Path) -> int:
    """Steps that are recorded."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
