"""Workers that do what real ones should not: each fault happens once, as a file that it leaves behind remembers."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.exceptions import ObjectLostError
from torch import Tensor

from rlalign.types import Unit

BIG = 100_000  # numbers: more than the driver takes to itself


class Faulty:
    """Adds; and dies, hangs or complains when it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights: Any = None
        self.made: list[Any] = []

    def once(self, name: str) -> bool:
        """True the first time that anyone asks, in all processes."""
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def add(self, one: Any, other: Any) -> Any:
        return one + other

    def pair(self, number: int) -> tuple[int, Tensor]:
        return number, torch.full((BIG,), float(number))

    def total(self, parts: list[Tensor]) -> float:
        return float(sum(part.sum() for part in parts))

    def echo(self, value: Any) -> Any:
        return value

    def pid(self) -> int:
        return os.getpid()

    def hold(self, weights: Any) -> Any:
        if weights == "dies once" and self.once("hold"):
            os.kill(os.getpid(), signal.SIGKILL)
        if weights == "lost":
            raise ObjectLostError("0" * 56, b"", "")  # what a worker gets that fetches them itself
        self.weights = weights
        return weights

    def held(self, number: int) -> tuple[int, Any]:
        time.sleep(0.02)
        return number, self.weights

    def dies_once(self, number: int) -> int:
        if self.once(f"died-{number}"):
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    def segfaults(self, unit: Unit) -> None:
        np.ctypeslib.ctypes.string_at(0)

    def stops_once(self, number: int) -> int:
        if self.once("stopped"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return number

    def hangs_once(self, number: int) -> int:
        if self.once("hung"):
            time.sleep(10_000)
        return number

    def complains(self, words: str) -> None:
        raise ValueError(words)

    def leaks(self, gib: float) -> int:
        self.made.append(bytearray(int(gib * 2**30)))
        return len(self.made)


class Rank(Faulty):
    """Of a group; the second one hangs at its first start."""

    def __init__(self, folder: Path, rank: int, size: int, address: str) -> None:
        super().__init__(folder)
        self.rank = rank
        if rank == 1 and self.once("start"):
            time.sleep(10_000)

    def loses_the_other(self) -> None:
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer")

    def fails_alone(self) -> None:
        if self.rank == 0:
            time.sleep(10_000)  # as in an exchange that the other one never comes to
        raise ValueError("this rank is full")


def faulty(folder: Path) -> Faulty:
    return Faulty(folder)


def faulty_third(folder: Path) -> Faulty:
    """The third process has bad luck when it starts."""
    worker = Faulty(folder)
    if next(number for number in range(100) if worker.once(f"start-{number}")) == 2:
        raise OSError("the disk is away")
    return worker


def broken(folder: Path) -> Faulty:
    raise ValueError("there is no such reward")


def stillborn(folder: Path) -> Faulty:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def sampler_that_dies_while_weights_arrive(tree: dict[str, Any], run: str) -> Any:
    """The real one; whoever is first to be given version 2 dies of it, and leaves a file in the run directory."""
    from rlalign import build

    sampler = build.sampler_from(tree)
    receive, mark = sampler.receive, Path(run) / "died-while-weights-arrived"

    def dies(manifest: Any, buckets: Any) -> Any:
        if manifest.version == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return receive(manifest, buckets)

    sampler.receive = dies
    return sampler
