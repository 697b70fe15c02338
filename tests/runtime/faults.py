"""Workers that do what real ones should not: each fault happens once, as a file that it leaves behind remembers."""

import os
import signal
import time
from collections.abc import Sequence
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


def faulty_late(folder: Path) -> Faulty:
    """The second process takes as long to start as there is no file `go`, and then complains."""
    worker = Faulty(folder)
    if next(number for number in range(100) if worker.once(f"start-{number}")) == 1:
        while not (folder / "go").exists():
            time.sleep(0.01)
        raise OSError("the disk is away")
    return worker


def broken(folder: Path) -> Faulty:
    raise ValueError("there is no such reward")


def stillborn(folder: Path) -> Faulty:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def dying_sampler(tree: dict[str, Any], run: str, steps: Sequence[int] = ()) -> Any:
    """The real one. Who is first to be given version 2 dies of it, and who is first at a unit of one of the ``steps``.

    Files in the run directory tell of each death.
    """
    from rlalign import build

    sampler = build.sampler_from(tree)
    receive, sample = sampler.receive, sampler.sample

    def receives(manifest: Any, buckets: Any) -> Any:
        if manifest.version == 2:
            once(Path(run) / "died-while-weights-arrived", signal.SIGKILL)
        return receive(manifest, buckets)

    def samples(unit: Unit, *args: Any) -> Any:
        if unit.purpose == "rollout" and unit.step in steps:
            once(Path(run) / f"died-at-step-{unit.step}", signal.SIGKILL)
        return sample(unit, *args)

    sampler.receive, sampler.sample = receives, samples
    return sampler


def stopping_scorer(tree: dict[str, Any], run: str, step: int) -> Any:
    """The real one, stopped (SIGSTOP) when it is at this step for the first time."""
    from rlalign import build

    scorer = build.scorer_from(tree)
    score = scorer.score

    def scores(images: Tensor, unit: Unit, *args: Any) -> Any:
        if unit.purpose == "rollout" and unit.step == step:
            once(Path(run) / "scorer-stopped", signal.SIGSTOP)
        return score(images, unit, *args)

    scorer.score = scores
    return scorer


def dying_learner(
    tree: dict[str, Any], rank: int, size: int, address: str, *, run: str, doomed: int, version: int
) -> Any:
    """The real one; rank ``doomed`` dies when it is to update this version for the first time."""
    from rlalign import build

    learner = build.learner_from(tree, rank, size, address)
    update = learner.update

    def updates(trajectories: Any, advantages: Any, number: int, *args: Any) -> Any:
        if rank == doomed and number == version:
            once(Path(run) / "learner-died", signal.SIGKILL)
        return update(trajectories, advantages, number, *args)

    learner.update = updates
    return learner


def once(mark: Path, number: int) -> None:
    """This process gets the signal, unless the file is there; it is afterwards."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), number)
