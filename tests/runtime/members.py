"""Workers in processes of their own without Ray: enough of a pool to publish to, and to kill members of."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from operator import attrgetter
from typing import Any

import psutil
import torch
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.workers.sampler import Sampler
from tests.small import algorithm, policy, workers

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__])


def make_learner() -> Any:
    return workers(algorithm("nft"))[1]


def make_sampler() -> Any:
    return Sampler(policy(), Noise(0), "old", keep_steps=False, shares=False)


def make_doomed_sampler() -> Any:
    """It dies when the others wait for it in the broadcast."""
    sampler = make_sampler()
    sampler.exchange = lambda generation, manifest: os.kill(os.getpid(), signal.SIGKILL)
    return sampler


def make_stopping_sampler() -> Any:
    """It is stopped when the others wait for it in the broadcast, and lives."""
    sampler = make_sampler()
    sampler.exchange = lambda generation, manifest: os.kill(os.getpid(), signal.SIGSTOP)
    return sampler


def make_deaf_sampler() -> Any:
    """What the broadcast brings it is damaged."""
    sampler = make_sampler()
    pass_on = sampler.broadcast._pass_on

    def damage(generation: int, buckets: Sequence[Tensor]) -> None:
        pass_on(generation, buckets)
        buckets[0][0] += 1

    sampler.broadcast._pass_on = damage
    return sampler


def serve(make: Callable[[], Any], *channels: Connection) -> None:
    """Calls of one channel run one after the other, those of the two beside each other."""
    torch.set_num_threads(1)
    worker = make()

    def answer(channel: Connection) -> None:
        while True:
            try:
                method, args = pickle.loads(channel.recv_bytes())
            except EOFError:
                os._exit(0)
            try:
                result = attrgetter(method)(worker)(*args)
            except Exception as error:
                result = error
            channel.send_bytes(pickle.dumps(result))

    threading.Thread(target=answer, args=channels[1:], daemon=True).start()
    answer(channels[0])


class Member:
    def __init__(self, make: Callable[[], Any]) -> None:
        ends = [context.Pipe() for _ in range(2)]
        self.channels = [own for own, _ in ends]
        self.process = context.Process(target=serve, args=(make, *[other for _, other in ends]), daemon=True)
        self.process.start()
        for _, other in ends:
            other.close()
        self.threads = [ThreadPoolExecutor(1) for _ in ends]

    def call(self, method: str, args: tuple[Any, ...], beside: bool = False) -> "Future[Any]":
        return self.threads[beside].submit(self._call, self.channels[beside], method, args)

    def _call(self, channel: Connection, method: str, args: tuple[Any, ...]) -> Any:
        channel.send_bytes(pickle.dumps((method, args)))
        result = pickle.loads(channel.recv_bytes())
        if isinstance(result, Exception):
            raise result
        return result

    def end(self) -> None:
        self.process.kill()
        for channel in self.channels:
            channel.close()
        for thread in self.threads:
            thread.shutdown()
        self.process.join()


class ProcessPool:
    """The verbs that publishing uses."""

    def __init__(self, *make: Callable[[], Any]) -> None:
        self.members = [Member(one) for one in make]
        self.size = len(make)
        self.held: tuple[str, tuple[Any, ...]] | None = None
        self.get(self.aside("generation"))  # all are up

    @property
    def alive(self) -> list[Member]:
        return [member for member in self.members if member.process.is_alive()]

    def end_stopped(self) -> None:
        """As a pool does with those that do not answer."""
        for member in self.alive:
            if psutil.Process(member.process.pid).status() == psutil.STATUS_STOPPED:
                member.process.kill()
                member.process.join()

    def add(self, make: Callable[[], Any]) -> Any:
        """A worker that starts late; what it answers to the call that the others made already."""
        self.members.append(Member(make))
        return self.members[-1].call(*self.held).result() if self.held else None

    def broadcast(self, method: str, *args: Any, returns: int = 1) -> list[Any]:
        found = [member.call(method, tuple(map(value, args))) for member in self.alive]
        return found if returns == 1 else [tuple(Part(one, i) for i in range(returns)) for one in found]

    def hold(self, method: str, *args: Any) -> list[Any]:
        self.held = method, tuple(map(value, args))
        return self.broadcast(method, *args)

    def get(self, refs: Sequence[Any]) -> list[Any]:
        return [value(ref) for ref in refs]

    def aside(self, method: str, *args: Any) -> list[Any]:
        return [member.call(method, args, beside=True) for member in self.alive]

    def wait_aside(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        wait(refs, timeout_s)
        return [(ref.exception() or ref.result()) if ref.done() else TimeoutError("no answer") for ref in refs]

    def close(self) -> None:
        for member in self.members:
            member.end()


@dataclass(frozen=True)
class Part:
    """One of the values of a call."""

    call: "Future[Any]"
    index: int


def value(ref: Any) -> Any:
    """Of a reference; anything else is its own."""
    if isinstance(ref, Part):
        return ref.call.result()[ref.index]
    return ref.result() if isinstance(ref, Future) else ref
