"""Handing the learner's weights to the samplers, version by version; bytes never pass through the driver."""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from rlalign.runtime.pool import Pool, Ref
from rlalign.workers.weights import Manifest


class Publisher(Protocol):
    def publish(self, learners: Pool, samplers: Pool, version: int) -> None:
        """What samplers are given after this, they do with these weights."""
        ...

    def settle(self, samplers: Pool) -> None:
        """Waits until every version that is under way is acknowledged."""
        ...

    def forget(self) -> None:
        """After workers were lost, with what they were asked: nobody waits for it any more."""
        ...


class ObjectStore:
    """Learner -> object store -> samplers: no group that can break, and who comes later reads it too.

    While samplers work ahead, by ``max_staleness`` steps, their acknowledgements come so many versions later: earlier
    units go first. ``shares``: the one sampler has the learner's own network, and is told the version only. ``joins``:
    samplers may start at any version, so every one brings a canary for those to whom it is the first.
    """

    def __init__(
        self,
        names: Sequence[str],
        max_staleness: int = 0,
        canary_every: int = 0,
        shares: bool = False,
        joins: bool = False,
    ) -> None:
        self.names, self.max_staleness, self.canary_every = [*names], max_staleness, canary_every
        self.shares, self.joins = shares, joins
        self.waiting: deque[tuple[Manifest, list[Ref]]] = deque()
        self.first = True

    def publish(self, learners: Pool, samplers: Pool, version: int) -> None:
        packed = self.pack(learners, version)
        self.hand_over(learners, samplers, packed, packed[0][1])

    def settle(self, samplers: Pool) -> None:
        self._settle(samplers, 0)

    def forget(self) -> None:
        self.waiting.clear()
        self.first = True

    def pack(self, learners: Pool, version: int) -> list[tuple[Ref, Ref]]:
        """Manifest and buckets of each learner rank; only rank 0 has any."""
        due = self.first or (self.canary_every > 0 and version % self.canary_every == 0)
        canary = not self.shares and (due or self.joins)
        return learners.broadcast("publish", version, self.names, not self.shares, canary, due, returns=2)

    def hand_over(self, learners: Pool, samplers: Pool, packed: Sequence[tuple[Ref, Ref]], buckets: Any) -> None:
        # First this, then the wait for the learners: samplers begin before the driver has seen the manifest.
        acknowledged = samplers.hold("receive", packed[0][0], buckets)
        (manifest, *_) = learners.get([manifest for manifest, _ in packed])
        self.waiting.append((manifest, acknowledged))
        self._settle(samplers, 0 if self.first else self.max_staleness)
        self.first = False

    def _settle(self, samplers: Pool, under_way: int) -> None:
        while len(self.waiting) > under_way:
            manifest, refs = self.waiting.popleft()
            told = {"version": manifest.version, "checksum": manifest.checksum, "tensors": manifest.count}
            acknowledged = samplers.get(refs)
            if any(held not in (told, None) for held in acknowledged):  # None: it died, and reads again when it is back
                raise RuntimeError(f"samplers do not hold version {manifest.version} as {told}: {acknowledged}")
