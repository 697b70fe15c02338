"""The driver's side of all pools: hears what ends, who died and who hangs, and hands out work. One thread, no locks.

    submit -> ready (when what it waits for is there) -> running on a worker -> done
                ^------------- its worker died ------------'

The driver owns every retry: only it knows that a new process needs the last weights first.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from rlalign.runtime.calls import Call, Ledger
from rlalign.runtime.worker import Object

logger = logging.getLogger(__name__)

TICK_S = 1.0  # how long to wait for news before looking at the clock
PING_EVERY_S = 5.0

Event = Callable[[Object], None]


class Member(Protocol):
    """A pool, as the engine sees it."""

    ledger: Ledger
    role: str

    def events(self) -> Iterator[tuple[Object, Event]]:
        """What it waits for, and what to do when that is there."""
        ...

    def feed(self) -> None:
        """Hands work to workers that can take more."""
        ...

    def watch(self) -> None:
        """Looks for those that hang, and for new machines."""
        ...


class Engine:
    def __init__(self, in_flight_bytes: float) -> None:
        self.limit = in_flight_bytes
        self.members: list[Member] = []
        self.watched = 0.0
        self.order = 0
        self.changed: Callable[[], None] = lambda: None
        """Called when a worker came up or went."""

    def next_order(self) -> int:
        self.order += 1
        return self.order

    @property
    def full(self) -> bool:
        held = [member.ledger.bytes_in_flight for member in self.members if member.role != "learner"]
        return sum(held) >= self.limit  # published weights are not counted: they are there all the time

    def wait(self, done: Callable[[], bool], waited: Callable[[float, float], None]) -> None:
        """Works until ``done``; ``waited`` is told of the times in which there was nothing to do."""
        self._feed()
        while not done():
            self.pump(TICK_S, waited)

    def pump(self, timeout_s: float, waited: Callable[[float, float], None] = lambda start, end: None) -> None:
        """Waits for news, at most so long, and acts on all there is."""
        events = {found: event for member in self.members for found, event in member.events()}
        if events:
            started = time.time()
            found, _ = ray.wait([*events], num_returns=1, timeout=timeout_s, fetch_local=False)
            waited(started, time.time())
            if found:
                found, _ = ray.wait([*events], num_returns=len(events), timeout=0, fetch_local=False)
        else:
            time.sleep(min(timeout_s, 0.1))
            found = []
        for one in found:
            events[one](one)
        if time.monotonic() - self.watched > min(TICK_S, PING_EVERY_S):
            self.watched = time.monotonic()
            for member in self.members:
                member.watch()
        self._feed()

    def _feed(self) -> None:
        for member in self.members:
            member.feed()


def want(call: Call) -> None:
    """The driver waits for it, so neither it nor what it needs may be held back."""
    if not call.wanted and not call.done:
        call.wanted = True
        for ref in call.inputs():
            want(ref.call)


def make_again(lost: list[Call], waiting: Call) -> int:
    """Issues calls again whose values were lost and whom ``waiting`` needs, or is one of; how many were done before."""
    again = [call for call in lost if call.done]
    for call in again:
        call.again()
    if waiting not in lost:
        waiting.wait_for(lost)
    for call in lost:
        want(call)
    return len(again)


def end(actor: Any) -> None:
    """Kills a process, also one that is stopped; it may be gone already."""
    with contextlib.suppress(ValueError, RayError):
        ray.kill(actor)
