"""Weights by a broadcast in a private group, with the object store behind it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rlalign.runtime.pool import Pool, Ref
from rlalign.runtime.weights import ObjectStore
from rlalign.workers.group import own_address
from rlalign.workers.weights import Manifest

logger = logging.getLogger(__name__)

SLOWEST = 50e6  # bytes a second: a broadcast that is slower has failed


class PoolAside(Pool, Protocol):
    def aside(self, method: str, *args: Any) -> list[Any]:
        """The call on every live worker, beside its other work; what it returns is for `wait_aside`."""
        ...

    def wait_aside(self, refs: Sequence[Any], timeout_s: float) -> list[Any]:
        """The values, or exceptions in their places; refs of several pools may be mixed."""
        ...


@dataclass(frozen=True, slots=True)
class Later:
    """A value that a worker fetches itself, and only if it needs it."""

    ref: "ray.ObjectRef[Any]"

    def __call__(self) -> Any:
        return ray.get(self.ref)

    @staticmethod
    def of(ref: Any) -> "Later":
        """Of a pool's reference. Ray resolves references that are arguments, not those inside of one."""
        return Later(ref.object)


class Collective:
    """Learner rank 0 and the live samplers are a group, compared with who is alive before every version.

    Whoever got nothing by the broadcast, or comes later, reads the object store. So no failure of the group fails the
    run: it is built anew for the next version.
    """

    def __init__(
        self,
        names: Sequence[str],
        max_staleness: int = 0,
        canary_every: int = 0,
        timeout_s: float = 20.0,
        later: Callable[[Ref], Callable[[], Any]] = Later.of,
    ) -> None:
        self.store = ObjectStore(names, max_staleness, canary_every, joins=True)
        self.timeout_s, self.later = timeout_s, later
        self.generation = self.size = 0  # of the group that stands; fewer than 2: there is none
        self.server: TCPStore | None = None  # where members find each other; in the driver, which outlives them
        self.address = ("", 0)
        self.warned = False

    @property
    def names(self) -> list[str]:
        return self.store.names

    def publish(self, learners: PoolAside, samplers: PoolAside, version: int) -> None:
        alive = self._alive(learners, samplers)
        stands = self.size > 1 and alive == [self.generation] * self.size
        if not stands:
            stands = self._build(learners, samplers, len(alive))
        packed = self.store.pack(learners, version)
        (manifest, *_) = learners.get([manifest for manifest, _ in packed])
        if stands:
            self._broadcast(learners, samplers, manifest)
        self.store.hand_over(learners, samplers, packed, self.later(packed[0][1]))

    def settle(self, samplers: Pool) -> None:
        self.store.settle(samplers)

    def forget(self) -> None:
        self.store.forget()

    def _alive(self, learners: PoolAside, samplers: PoolAside) -> list[int]:
        """The generations that the live learner and samplers are in; none where the learner gives no answer."""
        ranks = learners.aside("generation")
        if len(ranks) < learners.size:  # they were lost, and are not back
            return []
        learner, *others = samplers.wait_aside([ranks[0], *samplers.aside("generation")], self.timeout_s)
        return [] if isinstance(learner, Exception) else [learner, *(g for g in others if not isinstance(g, Exception))]

    def _build(self, learners: PoolAside, samplers: PoolAside, size: int) -> bool:
        self.size = size
        if size < 2:
            return False
        if self.server is None:
            host = own_address()
            self.server = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            self.address = host, self.server.port
        self.generation += 1
        args = self.address, self.generation, size, self.timeout_s
        found = self._ask(learners, samplers, 2 * self.timeout_s, "join", *args)
        return self._all_well(found, self.generation, f"the group of {size} for weights was not built")

    def _broadcast(self, learners: PoolAside, samplers: PoolAside, manifest: Manifest) -> None:
        """One answer from every member: success on one side says nothing about the others."""
        limit = 2 * self.timeout_s + manifest.num_bytes / SLOWEST
        found = self._ask(learners, samplers, limit, "exchange", self.generation, manifest)
        self._all_well(found, manifest.checksum, f"the broadcast of version {manifest.version} failed")

    def _all_well(self, found: Sequence[Any], wanted: int, trouble: str) -> bool:
        good = [answer for answer in found if answer == wanted]
        if len(good) == self.size:
            return True
        errors = [answer for answer in found if isinstance(answer, Exception)]
        level = logging.DEBUG if self.warned else logging.WARNING
        reason = str(errors[0]).splitlines()[0] if errors and str(errors[0]) else "not all answered"
        logger.log(level, "%s (%s); the object store takes its place, and the group is built anew", trouble, reason)
        self.warned, self.size = True, 0
        return False

    def _ask(self, learners: PoolAside, samplers: PoolAside, timeout_s: float, method: str, *args: Any) -> list[Any]:
        """Answers of learner rank 0 and the samplers, waited for together: else the death of one is heard too late."""
        refs = [*learners.aside(method, *args)[:1], *samplers.aside(method, *args)]
        return samplers.wait_aside(refs, timeout_s)
