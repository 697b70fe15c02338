"""The seam between the loop and machines: a pool of like workers, and five verbs."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rlalign.types import Span

Ref = Any
"""A value that may still be on its way, wherever it lives. Calls take references and see the values."""

DRIVER, WAIT = "driver", "wait "
"""Whose spans the waits are, and what their methods begin with; the role follows."""


class WorkerFailure(Exception):
    """Workers died too often, or one piece of work kills every worker; one sentence for the user."""


class LearnersLost(WorkerFailure):
    """A learner rank died, and its group with it; the last checkpoint is the way on."""


@contextmanager
def wait(role: str, add: Callable[[Span], None]) -> Iterator[None]:
    """Around what ``get`` blocks on: a span of the driver, so that a trace shows for whom the loop waits."""
    started = time.time()
    try:
        yield
    finally:
        add(Span(DRIVER, f"{WAIT}{role}", started, time.time()))


class Pool(Protocol):
    size: int

    def submit(self, method: str, *args: Any, returns: int = 1) -> Any:
        """Calls the method on one worker; one Ref, or ``returns`` of them for a method that returns a tuple."""
        ...

    def scatter(self, method: str, items: Sequence[tuple[Any, ...]]) -> list[Ref]:
        """The i-th arguments to the i-th worker."""
        ...

    def broadcast(self, method: str, *args: Any, returns: int = 1) -> list[Any]:
        """The same call on every worker, after what it was given before and before what it is given later.

        A Ref of each, or ``returns`` of them, as for ``submit``.
        """
        ...

    def hold(self, method: str, *args: Any) -> list[Ref]:
        """As ``broadcast``; workers that start later make the call too, before anything else."""
        ...

    def get(self, refs: Sequence[Ref]) -> list[Any]:
        """Waits for the values; raises what the worker raised."""
        ...

    def spans(self) -> list[Span]:
        """Calls that ended since the last time this was asked, and the ``wait`` spans of ``get``."""
        ...

    def counters(self) -> dict[str, float]:
        """Rows' ``runtime/...``: what is so now, such as live workers, and totals since the start, such as restarts."""
        ...


class Runtime(Protocol):
    """What stands behind the pools of a run."""

    def members(self) -> list[dict[str, Any]]:
        """Role, index, pid, node and state of every worker."""
        ...

    def follow(self, logs: Path, changed: Callable[[], None]) -> None:
        """From now on: where workers that have logs write them, and who hears of workers that come and go."""
        ...

    def recover(self) -> None:
        """After `LearnersLost`: new learners, and no work under way."""
        ...

    def close(self) -> None: ...
