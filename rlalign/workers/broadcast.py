"""The private group in which the first learner rank hands buckets to the live samplers, over gloo.

Never torch.distributed's default group, which is the learner ranks' own. A generation is one set of members: whoever
joins, dies or fails ends it. gloo cannot be interrupted, so all of this runs beside a worker's other calls.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    ProcessGroupGloo,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from rlalign.workers.group import own_address
from rlalign.workers.weights import Manifest, Memory

ROOT = 0  # the rank that sends


class Broadcast:
    """One process's end."""

    def __init__(self) -> None:
        self.generation = 0  # 0: in no group
        self.group: Any = None
        self.memory = Memory()
        self.arrived: dict[int, tuple[Manifest, list[Tensor]]] = {}  # versions that were verified and not yet taken

    def join(self, address: tuple[str, int], generation: int, size: int, timeout_s: float, root: bool) -> int:
        """Returns once all ``size`` members are there; any later exchange fails when one is missing for so long."""
        self.leave()
        timeout = timedelta(seconds=timeout_s)
        store = PrefixStore(f"{generation}", TCPStore(*address, is_master=False, timeout=timeout))
        rank = ROOT if root else store.add("members", 1)
        options: Any = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]
        options._timeout = timeout
        options._devices = [ProcessGroupGloo.create_device(hostname=own_address(address))]
        self.group = ProcessGroupGloo(store, rank, size, options)
        self.generation = generation
        return generation

    def send(self, generation: int, manifest: Manifest, buckets: Sequence[Tensor]) -> int:
        """The manifest's checksum, when all was handed on; that is no proof that it arrived."""
        self._pass_on(generation, buckets)
        return manifest.checksum

    def receive(self, generation: int, manifest: Manifest) -> int:
        """Keeps the buckets for ``take``; the checksum of what arrived."""
        buckets = [self.memory.take(size) for size in manifest.sizes]
        self._pass_on(generation, buckets)
        manifest.verify(buckets)
        self.arrived[manifest.version] = manifest, buckets
        return manifest.checksum

    def take(self, manifest: Manifest) -> list[Tensor] | None:
        """The buckets of this version, if they arrived. Older ones are forgotten."""
        arrived, buckets = self.arrived.get(manifest.version, (None, None))
        for version in [*self.arrived]:
            if version <= manifest.version:
                del self.arrived[version]
        return buckets if arrived == manifest else None  # a run that went back to a checkpoint counts again

    def leave(self) -> None:
        self.generation, self.group = 0, None

    def _pass_on(self, generation: int, buckets: Sequence[Tensor]) -> None:
        if generation != self.generation:
            raise RuntimeError(f"this process is in generation {self.generation} of the group, not in {generation}")
        try:
            for bucket in buckets:
                self.group.broadcast(bucket, ROOT).wait()
        except RuntimeError:
            self.leave()  # what others got is unknown: nobody uses this group again
            raise
