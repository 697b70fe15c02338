"""A role without any machine: a run that waits for one says so, and does not wait for ever."""

import logging
import time
from collections.abc import Callable

from rlalign.runtime.pool import WorkerFailure

logger = logging.getLogger(__name__)

SAY_EVERY_S = 60.0


class Vacancy:
    """``complaint``: what the machines that are up could never hold, as one sentence, or None."""

    def __init__(self, role: str, complaint: Callable[[], str | None]) -> None:
        self.role, self.complaint = role, complaint
        self.since: float | None = None
        self.said = 0.0

    def watch(self, vacant: bool, limit_s: float) -> None:
        """Asked again and again; WorkerFailure when it was ``vacant`` for longer than the limit."""
        now = time.monotonic()
        if not vacant:
            self.since = None
            return
        if self.since is None:
            self.since = self.said = now
        if now - self.since > limit_s:
            raise WorkerFailure(f"{self._state(now)}; the same command goes on from the last checkpoint")
        if now - self.said > SAY_EVERY_S:
            self.said = now
            logger.warning("%s; the run waits, for %g s at most", self._state(now), limit_s)

    def _state(self, now: float) -> str:
        assert self.since is not None
        why = self.complaint() or "the machines that are up are large enough, but in use"
        return f"no {self.role} has had a machine for {now - self.since:.0f} s: {why}"
