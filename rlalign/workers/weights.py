"""Published weights: flat buckets of bytes, and a manifest by which a receiver sees that all of them came through."""

import json
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

Variants = Mapping[str, Mapping[str, Tensor]]
"""policy | old | ema -> parameter name -> tensor."""

BUCKET_BYTES = 256 * 2**20
"""Of one bucket at most; a tensor that is larger has a bucket of its own, so that none has to be put together."""
ALIGNMENT = 64  # of tensors in a bucket: whole cache lines, and any dtype can be seen in place


class Kind(NamedTuple):
    """A tensor without its values."""

    variant: str
    name: str
    dtype: str  # "bfloat16"
    shape: tuple[int, ...]


class Place(NamedTuple):
    """A tensor, and where its bytes are."""

    kind: Kind
    bucket: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one version consists of. Without buckets it tells of a network that the reader shares."""

    version: int
    table: bytes = b"[]"  # the places, in a form that costs nothing to send and is read once a process
    sizes: tuple[int, ...] = ()  # bytes of each bucket
    checksums: tuple[int, ...] = ()  # xxh3 of each bucket
    canary: Tensor | None = field(default=None, compare=False)  # what the learner predicts, where that is to be checked

    @property
    def places(self) -> tuple[Place, ...]:
        return _read(self.table)

    @property
    def count(self) -> int:
        return len(self.places)

    @property
    def num_bytes(self) -> int:
        return sum(place.stop - place.start for place in self.places)

    @property
    def checksum(self) -> int:
        """Of everything: names, dtypes, shapes, places and bytes."""
        return xxhash.xxh3_64_intdigest(self.table + repr((self.sizes, self.checksums)).encode())

    def verify(self, buckets: Sequence[Tensor]) -> None:
        """ValueError when there is nothing in it, or the buckets are not those that were packed."""
        self.require_tensors()
        found = tuple(bucket.nbytes for bucket in buckets)
        if found != self.sizes or tuple(map(checksum, buckets)) != self.checksums:
            raise ValueError(
                f"weights of version {self.version} were damaged on the way: the bytes of {self.count} tensors in "
                f"{len(self.sizes)} buckets differ from those that were sent"
            )

    def require_tensors(self) -> None:
        if not self.count:
            raise ValueError(f"weights of version {self.version} hold no tensors: nothing would reach the samplers")

    def require_fit(self, held: Variants) -> None:
        """ValueError unless it has exactly these tensors, under each of its names for them."""
        wanted, brought = _kinds(held), tuple(place.kind for place in self.places)
        if wanted != brought:
            raise ValueError(f"weights of version {self.version}: {_difference(wanted, brought)}")

    def unpack(self, buckets: Sequence[Tensor]) -> dict[str, dict[str, Tensor]]:
        """The tensors, as views of the buckets."""
        variants: dict[str, dict[str, Tensor]] = {}
        for place, view in _views(self.places, buckets):
            variants.setdefault(place.kind.variant, {})[place.kind.name] = view
        return variants


def describe(version: int, variants: Variants) -> Manifest:
    """Of weights that need not travel."""
    return Manifest(version, _laid_out(_kinds(variants), BUCKET_BYTES)[0])


def pack(
    version: int,
    variants: Variants,
    memory: "Memory",
    canary: Tensor | None = None,
    bucket_bytes: int = BUCKET_BYTES,
) -> tuple[Manifest, list[Tensor]]:
    """Copies the tensors into flat buckets, uint8 on the CPU; one copy and one pass of the checksum."""
    table, sizes = _laid_out(_kinds(variants), bucket_bytes)
    buckets = [memory.take(size) for size in sizes]
    flat, sums = [bucket.numpy() for bucket in buckets], [xxhash.xxh3_64() for _ in buckets]
    for place, view in _views(_read(table), buckets):
        view.copy_(variants[place.kind.variant][place.kind.name])
        end = _aligned(place.stop)
        flat[place.bucket][place.stop : end] = 0  # what lay there before must not reach the checksum
        sums[place.bucket].update(flat[place.bucket][place.start : end].data)  # while it is in the processor's cache
    return Manifest(version, table, sizes, tuple(total.intdigest() for total in sums), canary), buckets


class Memory:
    """Memory for buckets, used again once nobody looks at them any more.

    Fresh pages cost more than all the rest: 500 MB are copied in 0.06 s into memory that was used before, and in 0.3 s
    into memory that was not.
    """

    def __init__(self) -> None:
        self.blocks: list[tuple[np.ndarray[Any, Any], weakref.ref[Any]]] = []

    def take(self, size: int) -> Tensor:
        """[size] uint8, not cleared."""
        idle = [block for block, user in self.blocks if user() is None]
        block = next((block for block in idle if block.nbytes == size), None)
        if block is None:
            self.blocks = [(block, user) for block, user in self.blocks if user() is not None]
            block = np.empty(size, np.uint8)
        user = block.view()  # lives as long as any tensor or array that shows these bytes
        self.blocks = [(other, its) for other, its in self.blocks if other is not block] + [(block, weakref.ref(user))]
        return torch.from_numpy(user)


def checksum(bucket: Tensor) -> int:
    """xxh3, 64 bits: 25 GB/s where crc32 makes 4 (benchmarks/publish.py). Against accidents, not against attackers."""
    return xxhash.xxh3_64_intdigest(bucket.numpy().data)


def _kinds(variants: Variants) -> tuple[Kind, ...]:
    if not variants or not all(variants.values()):
        raise ValueError(f"weights {', '.join(variants)} hold no tensors: nothing would reach the samplers")
    return tuple(
        Kind(variant, name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for variant in sorted(variants)
        for name, tensor in sorted(variants[variant].items())
    )


@lru_cache(maxsize=8)
def _laid_out(kinds: tuple[Kind, ...], bucket_bytes: int) -> tuple[bytes, tuple[int, ...]]:
    """The table, and the buckets' sizes: each tensor goes into the last bucket or, where it has no room, a new one."""
    places: list[Place] = []
    sizes: list[int] = []
    for kind in kinds:
        num_bytes = math.prod(kind.shape) * getattr(torch, kind.dtype).itemsize
        if not sizes or sizes[-1] + num_bytes > bucket_bytes:
            sizes.append(0)
        start = sizes[-1]
        places.append(Place(kind, len(sizes) - 1, start, start + num_bytes))
        sizes[-1] = _aligned(start + num_bytes)
    return json.dumps(places).encode(), tuple(sizes)


@lru_cache(maxsize=8)
def _read(table: bytes) -> tuple[Place, ...]:
    """JSON has lists where the table has tuples."""
    return tuple(
        Place(Kind(variant, name, dtype, tuple(shape)), bucket, start, stop)
        for (variant, name, dtype, shape), bucket, start, stop in json.loads(table)
    )


def _aligned(end: int) -> int:
    return -(-end // ALIGNMENT) * ALIGNMENT


def _views(places: Sequence[Place], buckets: Sequence[Tensor]) -> Iterator[tuple[Place, Tensor]]:
    for place in places:
        part = buckets[place.bucket][place.start : place.stop]
        yield place, part.view(getattr(torch, place.kind.dtype)).view(place.kind.shape)


def _difference(wanted: Sequence[Kind], brought: Sequence[Kind]) -> str:
    ours, theirs = ({(kind.variant, kind.name): kind for kind in kinds} for kinds in (wanted, brought))
    missing, strange = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing or strange:
        return f"{len(missing)} missing {missing[:3]}, {len(strange)} strange {strange[:3]}"
    own, sent = next((ours[key], theirs[key]) for key in ours if ours[key] != theirs[key])
    return f"{own.variant} {own.name} is {sent.dtype} {list(sent.shape)}, not {own.dtype} {list(own.shape)}"
