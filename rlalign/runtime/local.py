"""Pools in this process: every worker has a thread, and does its calls in the order in which they were made."""

import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlalign.runtime.pool import wait
from rlalign.types import Span, Unit


@dataclass(frozen=True, slots=True)
class LocalRef:
    future: "Future[Any]"
    index: int | None = None  # which of the values, for a call that returns several

    def value(self) -> Any:
        result = self.future.result()
        return result if self.index is None else result[self.index]


class LocalPool:
    """Calls go to the workers in turn, so that which worker does what is the same in every run."""

    def __init__(self, role: str, workers: Sequence[Any], threads: int) -> None:
        self.role = role
        self.workers = list(workers)
        self.size = len(self.workers)
        start = torch.set_num_threads
        self.executors = [ThreadPoolExecutor(1, initializer=start, initargs=(threads,)) for _ in workers]
        self.turn = 0
        self.ended: list[Span] = []
        self.lock = threading.Lock()

    def submit(self, method: str, *args: Any, returns: int = 1) -> Any:
        future = self._call(self.turn % self.size, method, args)
        self.turn += 1
        return LocalRef(future) if returns == 1 else tuple(LocalRef(future, i) for i in range(returns))

    def scatter(self, method: str, items: Sequence[tuple[Any, ...]]) -> list[LocalRef]:
        return [LocalRef(self._call(worker, method, args)) for worker, args in enumerate(items)]

    def broadcast(self, method: str, *args: Any, returns: int = 1) -> list[Any]:
        futures = [self._call(worker, method, args) for worker in range(self.size)]
        return [LocalRef(f) if returns == 1 else tuple(LocalRef(f, i) for i in range(returns)) for f in futures]

    def hold(self, method: str, *args: Any) -> list[LocalRef]:
        return self.broadcast(method, *args)  # workers in this process never start later

    def get(self, refs: Sequence[LocalRef]) -> list[Any]:
        with wait(self.role, self._add):
            return [ref.value() for ref in refs]

    def spans(self) -> list[Span]:
        with self.lock:
            ended, self.ended = self.ended, []
        return ended

    def counters(self) -> dict[str, float]:
        return {f"runtime/workers/{self.role}": float(self.size)}

    def close(self) -> None:
        for executor in self.executors:
            executor.shutdown(wait=False, cancel_futures=True)

    def _call(self, worker: int, method: str, args: tuple[Any, ...]) -> "Future[Any]":
        function: Callable[..., Any] = getattr(self.workers[worker], method)

        def call() -> Any:
            values = resolved(args)
            started = time.time()
            try:
                return function(*values)
            finally:
                self._add(span(f"{self.role}-{worker}", method, values, started))

        return self.executors[worker].submit(call)

    def _add(self, span: Span) -> None:
        with self.lock:
            self.ended.append(span)


class LocalRuntime:
    """All workers are threads of this process."""

    def __init__(self, pools: Sequence[LocalPool]) -> None:
        self.pools = pools

    def members(self) -> list[dict[str, Any]]:
        here = {"pid": os.getpid(), "node": platform.node(), "state": "up"}
        return [{"role": pool.role, "index": index, **here} for pool in self.pools for index in range(pool.size)]

    def follow(self, logs: Path, changed: Callable[[], None]) -> None:
        pass

    def recover(self) -> None:
        raise AssertionError("a thread cannot be lost alone")

    def close(self) -> None:
        for pool in self.pools:
            pool.close()


def span(worker: str, method: str, args: Sequence[Any], start: float) -> Span:
    """Of a call that ends now. Units of evaluation have no step."""
    unit = next((arg for arg in args if isinstance(arg, Unit)), None)
    step = unit.step if unit is not None and unit.purpose == "rollout" else None
    return Span(worker, method, start, time.time(), step, unit.groups if unit else ())


def resolved(value: Any) -> Any:
    """References in arguments, also inside lists and tuples, become their values."""
    if isinstance(value, LocalRef):
        return value.value()
    if isinstance(value, list | tuple):
        return type(value)(resolved(item) for item in value)
    return value
