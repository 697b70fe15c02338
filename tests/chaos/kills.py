"""kill -9 a real `rlalign train` again and again, go on with `rlalign resume`, and compare with a run left alone.

python -m tests.chaos.kills quickstart evaluation.num_images=64 --algorithm nft --steps 6
"""

import argparse
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlalign import checkpoint

TIMEOUT_S = 600
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "rlalign", *words]


def finish(words: Sequence[str]) -> None:
    """Runs rlalign to its end."""
    options: dict[str, Any] = {"env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": TIMEOUT_S}
    done = subprocess.run(command(*words), **options, check=False)
    assert done.returncode == 0, f"{shlex.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"


def kill_when(words: Sequence[str], ready: Callable[[], bool], delay_s: float) -> bool:
    """Starts rlalign and kills it ``delay_s`` after ``ready``; False when it ended by itself before."""
    process = subprocess.Popen(
        command(*words), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and not ready():
        assert time.monotonic() < deadline, "the run never came so far"
        time.sleep(0.001)
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode == -signal.SIGKILL


def rows_written(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoint_half_written(run: Path) -> bool:
    return any((run / "checkpoints").glob(".tmp-*/*"))


def killed_run(words: Sequence[str], run: Path, steps: int, kills: int, seed: int) -> int:
    """A run killed ``kills`` times, the second time while a checkpoint is written; how often that hit."""
    draw, hit = random.Random(seed), 0
    for number in range(kills):
        start = list(words) if number == 0 else ["resume", str(run)]
        if number == 1:
            killed = kill_when(start, lambda: checkpoint_half_written(run), 0.0)
        else:
            goal = rows_written(run) + draw.randint(1, max(1, steps // (2 * kills)))
            killed = kill_when(start, lambda goal=goal: rows_written(run) >= goal, draw.uniform(0, 0.2))
        hit += killed
    finish(["resume", str(run)] if kills else list(words))
    return hit


def result(run: Path) -> tuple[str, list[dict[str, Any]]]:
    """SHA-256 of the final checkpoint's tensors, put together from all ranks' parts, and all metrics but times.

    Not of its files: safetensors writes their descriptions in any order.
    """
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    tensors = checkpoint.load(newest).tensors
    assert tensors, f"{newest} holds no tensors"
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        total.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    digest = total.hexdigest()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return digest, [{k: v for k, v in row.items() if not of_the_clock(k)} for row in rows]


def of_the_clock(name: str) -> bool:
    return name.startswith(("time/", "runtime/")) or name.endswith("_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--algorithm", default="nft")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", arguments.recipe, f"algorithm={arguments.algorithm}", "checkpoint.every=2"]
        words += ["evaluation.every=3", *arguments.overrides, "--steps", str(arguments.steps), "--run-dir"]
        alone, broken = Path(folder) / "alone", Path(folder) / "broken"
        finish([*words, str(alone)])
        hit = killed_run([*words, str(broken)], broken, arguments.steps, arguments.kills, arguments.seed)
        (one, rows), (other, again) = result(alone), result(broken)
        print(f"{arguments.algorithm}: {hit} kills; SHA-256 of the final weights, alone and killed:\n{one}\n{other}")
        print(f"{len(rows)} and {len(again)} rows of metrics")
        assert one == other and rows == again
        print("equal to the unbroken run, bit for bit")


if __name__ == "__main__":
    main()
