"""The seam between the loop and machines: a pool of like workers, and five verbs."""

from collections.abc import Sequence
from typing import Any, Protocol

from rlalign.types import Span

Ref = Any
"""A value that may still be on its way, wherever it lives. Calls take references and see the values."""


class WorkerFailure(Exception):
    """Workers died too often, or one piece of work kills every worker; one sentence for the user."""


class LearnersLost(WorkerFailure):
    """A learner rank died, and its group with it; the last checkpoint is the way on."""


class Pool(Protocol):
    size: int

    def submit(self, method: str, *args: Any, returns: int = 1) -> Any:
        """Calls the method on one worker; one Ref, or ``returns`` of them for a method that returns a tuple."""
        ...

    def scatter(self, method: str, items: Sequence[tuple[Any, ...]]) -> list[Ref]:
        """The i-th arguments to the i-th worker."""
        ...

    def broadcast(self, method: str, *args: Any) -> list[Ref]:
        """The same call on every worker, after what it was given before and before what it is given later."""
        ...

    def hold(self, method: str, *args: Any) -> list[Ref]:
        """As ``broadcast``; workers that start later make the call too, before anything else."""
        ...

    def get(self, refs: Sequence[Ref]) -> list[Any]:
        """Waits for the values; raises what the worker raised."""
        ...

    def spans(self) -> list[Span]:
        """Calls that ended since the last time this was asked."""
        ...

    def close(self) -> None: ...
