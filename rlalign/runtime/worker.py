"""One place of a pool and the process that fills it; and what its failures mean in words."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError

from rlalign.runtime.calls import Call, Hold
from rlalign.runtime.host import Failure, Host, Where
from rlalign.scoring.call import Spent, spends

MAX_BACKOFF_S = 30.0
DEAD = (RayActorError, OutOfMemoryError, WorkerCrashedError)

Object = Any  # ray.ObjectRef, which is generic in new versions of Ray only


@dataclass(slots=True)
class Running:
    call: Call
    report: Object
    values: list[Object]


@dataclass(eq=False, slots=True)
class Worker:
    """One place of a pool, and the process that fills it now."""

    name: str
    index: int
    actor: Any = None
    starting: Object | None = None
    where: Where | None = None  # once it is up
    running: deque[Running] = field(default_factory=deque)
    holding: Hold | None = None
    since: float = 0.0  # when it began with what it does now
    ping: Object | None = None
    pinged: float = 0.0
    births: int = 0
    untried: bool = False  # a spare process, which may have died while it waited
    deaths: int = 0  # in a row, without a finished call
    finished: bool = False  # anything, since its birth
    resume_at: float = 0.0
    retired: bool = False

    @property
    def up(self) -> bool:
        return self.where is not None

    @property
    def described(self) -> str:
        return f"{self.name} (process {self.where.pid} on {self.where.node})" if self.where else self.name

    @property
    def deed(self) -> str:
        """What it is at."""
        return self.running[0].call.describe() if self.running else "its start"

    @property
    def pause(self) -> float:
        """Seconds to wait before the next process: none at first, then 1, 2, 4 ..."""
        return min(MAX_BACKOFF_S, 2.0 ** (self.deaths - 2)) if self.deaths > 1 else 0.0

    def begin(self, options: dict[str, Any], spare: Any | None) -> None:
        """In a spare process, or in a new one, of which Ray's own options say where."""
        self.actor = spare or Host.options(**options).remote()  # pyright: ignore[reportAttributeAccessIssue]
        self.births += 1
        self.untried = spare is not None
        self.since = time.monotonic()

    def vacate(self) -> None:
        """The process is gone."""
        self.actor = self.starting = self.where = self.ping = self.holding = None
        self.running.clear()
        self.finished = False

    def state(self) -> dict[str, Any]:
        """As `workers.json` shows it."""
        if self.where is None:
            return {"pid": None, "node": None, "state": "given up" if self.retired else "starting"}
        return {"pid": self.where.pid, "node": self.where.node, "state": "up"}


def raised(failure: Failure) -> BaseException:
    """What the worker raised, to be raised here; `raised_in` is the file that did, for its traceback stays there."""
    error = failure.error
    error.__cause__ = failure.cause
    error.add_note(f"in a worker process:\n{failure.trace}")
    error.raised_in = failure.file  # pyright: ignore[reportAttributeAccessIssue]
    return error


def spent(error: BaseException) -> bool:
    """Whether another process may do better than this one, which is full or holds a call that never ends."""
    return isinstance(error, Spent) or spends(error)


def value_or_error(ref: Object) -> Any:
    try:
        return ray.get(ref, timeout=0)
    except (RayError, GetTimeoutError) as error:
        return error.cause if isinstance(error, RayTaskError) else error


def in_words(error: BaseException) -> str:
    """Ray's messages are pages long; what happened stands after 'exit detail' or on the first line."""
    text = str(error)
    detail = text.partition("Worker exit detail: ")[2] or text
    return detail.strip().splitlines()[0].split(". Some common causes")[0].rstrip(".")[:200] if text else repr(error)
