"""A service in processes of its own, as `rlalign serve-reward` starts it."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("rewards.py")
LAST_LINE = "to stop"


@dataclass
class Running:
    url: str
    process: "subprocess.Popen[bytes]"
    out: Path
    err: Path


@contextmanager
def service(folder: Path, reward: str, *arguments: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "rlalign", "serve-reward", f"{FILE}:{reward}", *arguments, "--port", "0"]
    out, err = folder / "out", folder / "err"
    with out.open("wb") as words, err.open("wb") as complaints:
        process = subprocess.Popen(command, stdout=words, stderr=complaints, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: LAST_LINE in out.read_text() or process.poll() is not None)
        assert process.poll() is None, err.read_text()
        url = next(line.split()[1] for line in out.read_text().splitlines() if line.startswith("listening"))
        yield Running(url, process, out, err)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
