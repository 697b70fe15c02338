"""The seam between the loop and machines: a pool of like workers, and four verbs."""

from collections.abc import Sequence
from typing import Any, Protocol

Ref = Any
"""A value that may still be on its way, wherever it lives. Calls take references and see the values."""


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

    def get(self, refs: Sequence[Ref]) -> list[Any]:
        """Waits for the values; raises what the worker raised."""
        ...

    def timings(self) -> dict[str, float]:
        """Seconds that workers spent in each method since the last call, waiting for arguments not counted."""
        ...

    def close(self) -> None: ...
