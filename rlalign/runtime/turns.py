"""Two pools whose workers share GPUs, one worker of each on every GPU, and take turns there.

Before the workers of one are given work that computes, those of the other put everything that they have on the GPU into
CPU memory. A worker comes back by itself with its next call. Whoever starts, also in the place of one that died, loads
its model into CPU memory, and is given nothing but what the pool is asked for in its turn.
"""

from collections.abc import Sequence
from typing import Any

from rlalign.runtime.pool import Pool, Ref
from rlalign.types import Span

NO_TURN = ("save", "load")  # done in CPU memory as well


class Turns:
    """Who has the GPUs."""

    def __init__(self) -> None:
        self.holder: Pool | None = None

    def give(self, pool: Pool) -> None:
        """Returns when the other workers have left."""
        if self.holder is not None and self.holder is not pool:
            self.holder.get(self.holder.broadcast("rest"))
        self.holder = pool


class TurnPool:
    """See `Pool`."""

    def __init__(self, pool: Pool, turns: Turns) -> None:
        self.pool, self.turns = pool, turns
        self.size = pool.size

    def submit(self, method: str, *args: Any, returns: int = 1) -> Any:
        self._take(method)
        return self.pool.submit(method, *args, returns=returns)

    def scatter(self, method: str, items: Sequence[tuple[Any, ...]]) -> list[Ref]:
        self._take(method)
        return self.pool.scatter(method, items)

    def broadcast(self, method: str, *args: Any, returns: int = 1) -> list[Any]:
        self._take(method)
        return self.pool.broadcast(method, *args, returns=returns)

    def hold(self, method: str, *args: Any) -> list[Ref]:
        self._take(method)
        return self.pool.hold(method, *args)

    def get(self, refs: Sequence[Ref]) -> list[Any]:
        return self.pool.get(refs)

    def spans(self) -> list[Span]:
        return self.pool.spans()

    def counters(self) -> dict[str, float]:
        return self.pool.counters()

    def _take(self, method: str) -> None:
        if method not in NO_TURN:
            self.turns.give(self.pool)


def taking_turns(one: Pool, other: Pool) -> tuple[Pool, Pool]:
    turns = Turns()
    return TurnPool(one, turns), TurnPool(other, turns)
