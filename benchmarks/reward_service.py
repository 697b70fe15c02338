"""Pictures a second through `rlalign serve-reward`, how long a request takes, and what kills lose or score twice.

    python benchmarks/reward_service.py                                     # 1,000 pictures, two workers, no kill
    python benchmarks/reward_service.py --kills 3 --format safetensors --size 512 --pictures 256

The reward takes a moment for every call (--call-ms, as a network would) and writes the number of every picture that it
scores to a file, as its last deed before it returns. A kill is SIGKILL to a worker at a random moment, whatever it is
at. "lost" are pictures without their own number, "scored twice" those that stand in the file more than once; a kill
between that line and the return, which takes some microseconds, may cause such.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from rlalign.scoring import RewardConfig, load_reward
from rlalign.types import Prompt


class Counted:
    """The number that a picture's first pixel says."""

    def __init__(self, file: str, seconds: float) -> None:
        self.file, self.seconds = file, seconds

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[int]:
        numbers = [int(image[0, 0, 0]) * 256 + int(image[1, 0, 0]) for image in images]
        time.sleep(self.seconds)
        with open(self.file, "ab", buffering=0) as file:
            file.write(b"".join(b"%d\n" % number for number in numbers))
        return numbers


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as folder:
        process, url = started(asked, Path(folder))
        try:
            print(measured(asked, Path(folder), process, url))
        finally:
            process.terminate()
            process.wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pictures", 1000), ("size", 32), ("workers", 2), ("kills", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--request", type=int, default=4, help="pictures of a request")
    parser.add_argument("--clients", type=int, default=8, help="requests at a time")
    parser.add_argument("--call-ms", type=float, default=20.0)
    parser.add_argument("--format", choices=["png", "safetensors"], default="png")
    return parser.parse_args()


def started(asked: argparse.Namespace, folder: Path) -> tuple["subprocess.Popen[str]", str]:
    options = [f"file={folder / 'scored'}", f"seconds={asked.call_ms / 1000}"]
    where = ["--port", "0", "--workers", str(asked.workers)]
    command = [
        sys.executable,
        "-m",
        "rlalign",
        "serve-reward",
        *where,
        f"{Path(__file__).absolute()}:Counted",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = ""
    for line in process.stdout:
        if line.startswith("listening"):
            url = line.split()[1]
        if line.startswith("to stop"):
            return process, url
    raise SystemExit("the service did not start")


def measured(asked: argparse.Namespace, folder: Path, process: Any, url: str) -> str:
    reward = load_reward(RewardConfig(use=url, options={"format": asked.format}))
    groups = [
        range(start, min(start + asked.request, asked.pictures)) for start in range(0, asked.pictures, asked.request)
    ]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, asked.size, asked.size), dtype=torch.uint8, generator=generator)

    def ask(numbers: Sequence[int]) -> tuple[list[int], float]:
        images = noise.expand(len(numbers), -1, -1, -1).clone()
        images[:, :2, 0, 0] = torch.tensor([[number // 256, number % 256] for number in numbers], dtype=torch.uint8)
        before = time.monotonic()
        answer: Any = reward.function(images, [Prompt("a cat")] * len(numbers))
        return answer["score"], time.monotonic() - before

    done = threading.Event()
    killer = threading.Thread(target=kill, args=(asked.kills, process.pid, folder / "scored", asked.pictures, done))
    started = time.monotonic()
    killer.start()
    with ThreadPoolExecutor(asked.clients) as threads:
        answers = list(threads.map(ask, groups))
    seconds = time.monotonic() - started
    done.set()
    killer.join()
    found = [number for numbers, _ in answers for number in numbers]
    scored = Counter((folder / "scored").read_text().split())
    times = sorted(each for _, each in answers)
    return (
        f"{asked.pictures} pictures of {asked.size}x{asked.size} as {asked.format}, {asked.request} a request, "
        f"{asked.clients} requests at a time, {asked.workers} workers, {asked.kills} kills: "
        f"{asked.pictures / seconds:.0f} pictures/s, request median {1e3 * times[len(times) // 2]:.0f} ms, "
        f"slowest {1e3 * times[-1]:.0f} ms; lost {sum(map(int.__ne__, map(int, found), range(asked.pictures)))}, "
        f"scored twice {sum(number - 1 for number in scored.values())}"
    )


def kill(kills: int, front: int, file: Path, pictures: int, done: threading.Event) -> None:
    """Spread over the run, a moment after so many pictures are scored."""
    for number in range(kills):
        while not done.is_set() and (
            not file.exists() or file.read_bytes().count(b"\n") < pictures * (number + 1) / (kills + 1)
        ):
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.05))
        workers = psutil.Process(front).children()
        if workers and not done.is_set():
            os.kill(random.choice(workers).pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
