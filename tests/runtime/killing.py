"""Faults at chosen moments of a run that goes on elsewhere: in this thread, or in another process."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

REWARD = """
import time
from pathlib import Path

closed, reached = Path({closed!r}), Path({reached!r})
calls = 0

def first(images, prompts):
    global calls
    calls += 1
    if calls > {calls} and closed.exists():
        reached.touch()
        while closed.exists():
            time.sleep(0.01)
    return images[:, 0, 0, 0].float() / 255
"""


class Gate:
    """A run's reward that waits in the middle of the run while this is closed, so that no fault comes too late."""

    def __init__(self, folder: Path, calls: int) -> None:
        """The scorer does so many ``calls`` first."""
        self.closed, self.at = folder / "closed", folder / "reached"
        words = REWARD.format(closed=str(self.closed), reached=str(self.at), calls=calls)
        (folder / "reward.py").write_text(words)

    def close(self) -> None:
        self.closed.touch()

    def reached(self) -> bool:
        return self.at.exists()

    def open(self) -> None:
        self.closed.unlink()


def in_background(when: Callable[[], bool], deed: Callable[[], object]) -> threading.Thread:
    def wait() -> None:
        while not when():
            time.sleep(0.002)
        deed()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill(role: str, index: int, run: Path, when: Callable[[], bool], number: int) -> threading.Thread:
    """Sends a signal to a worker of the run once ``when`` holds and the worker has a process."""

    def hit() -> bool:
        for worker in json.loads((run / "workers.json").read_text()):
            if (worker["role"], worker["index"]) == (role, index) and worker["pid"]:
                try:
                    os.kill(worker["pid"], number)
                except ProcessLookupError:  # the file tells of one that is gone
                    return False
                return True
        return False

    return in_background(lambda: (run / "workers.json").exists() and when() and hit(), lambda: None)


def rows(run: Path) -> int:
    """Steps that are recorded."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
