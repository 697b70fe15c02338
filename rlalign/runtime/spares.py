"""Processes that wait: on every machine one that has imported what workers need, to take the seat of one that died.

A process that imports torch, diffusers and transformers is busy for seconds before it can load a model; a spare one has
that behind it. Only workers without a GPU get one: Ray says which GPU a process sees when it starts, and the imports
may fix that.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any

from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlalign.runtime.engine import end
from rlalign.runtime.host import Host
from rlalign.runtime.worker import value_or_error

REST_S = 4.0  # between a death and the next spare process: who comes back has the cores first
LONG_REST_S = 12.0  # who comes back without one needs longer


class Spares:
    """``warm``: the imports, run once in every spare process."""

    def __init__(self, warm: Callable[[], None]) -> None:
        self.warm = warm
        self.kept: dict[str, Any] = {}  # actors by machine
        self.pings: dict[str, Any] = {}  # the last one of each
        self.due: dict[str, float] = {}  # by machine: when the next one is started

    def keep(self, machines: Iterable[str]) -> None:
        """Starts those that are lacking or have died."""
        now = time.monotonic()
        self._bury(now)
        for machine in {*machines} - self.kept.keys():
            if now >= self.due.get(machine, now):
                where = NodeAffinitySchedulingStrategy(machine, soft=False)
                actor = Host.options(num_cpus=0, scheduling_strategy=where).remote()  # pyright: ignore[reportAttributeAccessIssue]
                actor.run.remote(self.warm)
                self.kept[machine], self.pings[machine] = actor, actor.ping.remote()

    def take(self, machine: str) -> Any | None:
        """The one of this machine, also in the midst of its imports, of which a new one would have more before it.

        It may be dead, which its first call will show.
        """
        actor = self.kept.pop(machine, None)
        self.due[machine] = time.monotonic() + (LONG_REST_S if actor is None else REST_S)
        return actor

    def _bury(self, now: float) -> None:
        """Forgets those that died, or whose machine did."""
        for machine, actor in [*self.kept.items()]:
            answer = value_or_error(self.pings[machine])
            if isinstance(answer, GetTimeoutError):
                continue
            if isinstance(answer, RayError):
                del self.kept[machine]
                self.due[machine] = now + LONG_REST_S
            else:
                self.pings[machine] = actor.ping.remote()

    def close(self) -> None:
        for actor in self.kept.values():
            end(actor)
        self.kept.clear()
