"""The process of one worker: a Ray actor around a plain class."""

import os
import platform
import resource
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from rlalign.runtime import wire
from rlalign.runtime.local import span
from rlalign.runtime.worker_logs import at_step, install
from rlalign.types import Span, Unit

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Setup:
    """What a process needs to become a worker."""

    name: str  # "sampler-0"
    make: Callable[..., Any]  # makes the plain worker
    threads: int
    gpus: float
    memory_gib: float | None = None  # what it may allocate


@dataclass(frozen=True, slots=True)
class Where:
    """A process that is up, as `workers.json` tells it."""

    pid: int
    node: str  # host name
    address: str
    node_id: str


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a reference among a call's arguments."""

    index: int


@dataclass(frozen=True, slots=True)
class Failure:
    """What a call raised, with what pickling an exception loses."""

    error: BaseException
    cause: BaseException | None
    trace: str
    file: str  # that raised it


@dataclass(frozen=True, slots=True)
class Report:
    """All that the driver reads of a call whose values stay where they are."""

    span: Span | None
    failure: Failure | None
    num_bytes: tuple[int, ...] = ()


@ray.remote(concurrency_groups={"control": 1, "aside": 1}, max_restarts=0, max_task_retries=0)  # pyright: ignore[reportCallIssue]
class Host:
    """Its calls run one after the other; `ping` and `aside` beside them."""

    def __init__(self) -> None:
        wire.register()
        self.worker: Any = None
        self.name = ""

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """A function in this process, before it is a worker."""
        return function(*args)

    def setup(self, setup: Setup, *args: Any) -> tuple[Where, Failure | None]:
        self.name = setup.name
        torch.set_num_threads(setup.threads)
        if setup.gpus == 0:  # Ray would let it see all of the machine's
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        context = ray.get_runtime_context()
        where = Where(os.getpid(), platform.node(), ray.util.get_node_ip_address(), context.get_node_id())
        try:
            if setup.memory_gib is not None:
                limit_memory(setup.memory_gib)
            self.worker = setup.make(*args)
        except Exception as error:
            return where, failure(error)
        return where, None

    def call(self, method: str, args: Any, returns: int, *values: Any) -> Any:
        """A report, and the values of the worker's method beside it; `values` stand in the places of `Slot`s."""
        given = filled(args, values)
        at_step(next((arg.step for arg in given if isinstance(arg, Unit)), None))
        started = time.time()
        try:
            result = getattr(self.worker, method)(*given)
        except Exception as error:
            return Report(None, failure(error)), *[None] * returns
        results = (result,) if returns == 1 else result
        sizes = tuple(wire.num_bytes(value) for value in results)
        return Report(span(self.name, method, given, started), None, sizes), *results

    @ray.method(concurrency_group="aside")
    def aside(self, method: str, *args: Any) -> Any:
        return getattr(self.worker, method)(*args)

    @ray.method(concurrency_group="aside")
    def log_to(self, folder: Path, name: str) -> None:
        """From now on it writes its log into this folder."""
        install(folder, name)

    @ray.method(concurrency_group="control")
    def ping(self) -> None:
        pass


def filled(value: Any, values: tuple[Any, ...]) -> Any:
    if isinstance(value, Slot):
        return values[value.index]
    if isinstance(value, list | tuple):
        return type(value)(filled(item, values) for item in value)
    return value


def failure(error: BaseException) -> Failure:
    frames = traceback.extract_tb(error.__traceback__)
    cause = error.__cause__ and wire.can_travel(error.__cause__)
    trace = "".join(traceback.format_exception(error))
    return Failure(wire.can_travel(error), cause, trace, frames[-1].filename if frames else "")


def limit_memory(gib: float) -> None:
    """On top of what the process holds now. RLIMIT_DATA, since the address space is gigabytes from the start."""
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (held + int(gib * GIB), hard))
