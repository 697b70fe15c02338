"""Published weights: flat buckets of bytes, and a manifest by which a receiver sees that all of them came through."""

import json
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
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
CACHED_BYTES = 2**20  # of a piece, roughly: the processor still has it at hand for the second look


class Kind(NamedTuple):
    """A tensor without its values."""

    variant: str
    name: str
    dtype: str  # "bfloat16"
    shape: tuple[int, ...]


class Piece(NamedTuple):
    """Neighbours in a bucket that are copied and summed up together: the processor still has them at hand."""

    start: int  # in numbers, not bytes
    end: int
    kinds: tuple[Kind, ...]
    numels: tuple[int, ...]


class Layout(NamedTuple):
    """What one bucket holds: tensors of one dtype, one after the other."""

    dtype: str
    kinds: tuple[Kind, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return self.pieces[-1].end * getattr(torch, self.dtype).itemsize

    def fits(self, held: Variants) -> bool:
        dtype = getattr(torch, self.dtype)
        return all(
            (tensor := held.get(variant, {}).get(name)) is not None and tensor.dtype == dtype and tensor.shape == shape
            for variant, name, _, shape in self.kinds
        )


@dataclass(frozen=True, slots=True)
class Manifest:
    """What one version consists of. Without buckets it tells of a network that the reader shares."""

    version: int
    table: bytes = b"[]"  # the layouts, in a form that costs nothing to send and is read once a process
    checksums: tuple[int, ...] = ()  # xxh3 of each bucket
    canary: Tensor | None = field(default=None, compare=False)  # what the learner predicts
    canary_due: bool = True  # for everybody, and not only for those who have never compared one

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return _read(self.table)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(layout.num_bytes for layout in self.layouts)

    @property
    def count(self) -> int:
        return sum(len(layout.kinds) for layout in self.layouts)

    @property
    def names(self) -> set[str]:
        return {kind.variant for layout in self.layouts for kind in layout.kinds}

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes)

    @property
    def checksum(self) -> int:
        """Of everything: names, dtypes, shapes, places and bytes."""
        return xxhash.xxh3_64_intdigest(self.table + repr(self.checksums).encode())

    def verify(self, buckets: Sequence[Tensor]) -> None:
        """ValueError when there is nothing in it, or the buckets are not those that were packed."""
        self.require_tensors()
        if sizes_of(buckets) != self.sizes or tuple(map(checksum, buckets)) != self.checksums:
            raise ValueError(self._damaged())

    @torch.no_grad()
    def copy(self, buckets: Sequence[Tensor], held: Variants) -> None:
        """Copies everything into ``held``, which fits, and verifies it on the way, with the bytes still at hand.

        ValueError when they are not those that were sent, which is known at the end: ``held`` is not to be used then.
        """
        if sizes_of(buckets) != self.sizes:
            raise ValueError(self._damaged())
        checksums: list[int] = []
        for layout, bucket in zip(self.layouts, buckets, strict=True):
            total, flat = xxhash.xxh3_64(), bucket.view(getattr(torch, layout.dtype))
            for start, end, kinds, numels in layout.pieces:
                piece = flat[start:end]
                total.update(piece.view(torch.uint8).numpy().data)
                sources = [part.view(kind.shape) for part, kind in zip(piece.split(numels), kinds, strict=True)]
                torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                    [held[kind.variant][kind.name] for kind in kinds], sources
                )
            checksums.append(total.intdigest())
        if tuple(checksums) != self.checksums:
            raise ValueError(self._damaged())

    def _damaged(self) -> str:
        return (
            f"weights of version {self.version} were damaged on the way: the bytes of {self.count} tensors in "
            f"{len(self.checksums)} buckets differ from those that were sent"
        )

    def require_tensors(self) -> None:
        if not self.count:
            raise ValueError(f"weights of version {self.version} hold no tensors: nothing would reach the samplers")

    def require_fit(self, held: Variants) -> None:
        """ValueError unless it has exactly these tensors, under each of its names for them."""
        fits = all(layout.fits(held) for layout in self.layouts)
        if not fits or self.count != sum(map(len, held.values())):
            wanted, brought = _kinds(held), tuple(kind for layout in self.layouts for kind in layout.kinds)
            raise ValueError(f"weights of version {self.version}: {_difference(wanted, brought)}")


def describe(version: int, variants: Variants) -> Manifest:
    """Of weights that need not travel."""
    return Manifest(version, _table(_kinds(variants), BUCKET_BYTES))


def pack(
    version: int,
    variants: Variants,
    memory: "Memory",
    canary: Tensor | None = None,
    canary_due: bool = True,
    bucket_bytes: int = BUCKET_BYTES,
    whole: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Manifest, list[Tensor]]:
    """Copies the tensors into flat buckets, uint8 on the CPU; one copy and one pass of the checksum.

    ``whole``: puts a tensor together that lies in parts on several ranks, which have to `join_in` meanwhile. No more
    than a piece is whole at a time.
    """
    table = _table(_kinds(variants), bucket_bytes)
    buckets, checksums = [], []
    for layout in _read(table):
        bucket, total = memory.take(layout.num_bytes), xxhash.xxh3_64()
        flat = bucket.view(getattr(torch, layout.dtype))
        for start, end, kinds, _ in layout.pieces:
            piece = flat[start:end]
            tensors = [variants[kind.variant][kind.name] for kind in kinds]
            tensors = [tensor.reshape(-1) for tensor in (map(whole, tensors) if whole else tensors)]
            if tensors[0].device == flat.device:
                torch.cat(tensors, out=piece)
            else:
                piece.copy_(torch.cat(tensors))
            total.update(piece.view(torch.uint8).numpy().data)
        checksums.append(total.intdigest())
        buckets.append(bucket)
    return Manifest(version, table, tuple(checksums), canary, canary_due), buckets


def join_in(variants: Variants, whole: Callable[[Tensor], Tensor], bucket_bytes: int = BUCKET_BYTES) -> None:
    """On the other ranks, while one packs the same variants."""
    for layout in _read(_table(_kinds(variants), bucket_bytes)):
        for kind in layout.kinds:
            whole(variants[kind.variant][kind.name])


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


def sizes_of(buckets: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(bucket.nbytes for bucket in buckets)


def _kinds(variants: Variants) -> tuple[Kind, ...]:
    """In the order of the buckets."""
    if not variants or not all(variants.values()):
        raise ValueError(f"weights {', '.join(variants)} hold no tensors: nothing would reach the samplers")
    return tuple(
        sorted(
            (
                Kind(variant, name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                for variant, tensors in variants.items()
                for name, tensor in tensors.items()
            ),
            key=lambda kind: (kind.dtype, kind),
        )
    )


@lru_cache(maxsize=8)
def _table(kinds: tuple[Kind, ...], bucket_bytes: int) -> bytes:
    """Each tensor goes into the last bucket or, where it has no room or another dtype, into a new one."""
    buckets: list[list[Kind]] = []
    room = 0
    for kind in kinds:
        num_bytes = math.prod(kind.shape) * getattr(torch, kind.dtype).itemsize
        if not buckets or buckets[-1][0].dtype != kind.dtype or num_bytes > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(kind)
        room -= num_bytes
    return json.dumps(buckets).encode()


@lru_cache(maxsize=8)
def _read(table: bytes) -> tuple[Layout, ...]:
    buckets = [
        tuple(Kind(variant, name, dtype, tuple(shape)) for variant, name, dtype, shape in bucket)
        for bucket in json.loads(table)
    ]
    return tuple(Layout(kinds[0].dtype, kinds, tuple(_pieces(kinds))) for kinds in buckets)


def _pieces(kinds: Sequence[Kind]) -> Iterator[Piece]:
    """Each at least ``CACHED_BYTES`` long, but for the last."""
    itemsize, start, first, numels = getattr(torch, kinds[0].dtype).itemsize, 0, 0, list[int]()
    for number, kind in enumerate(kinds, 1):
        numels.append(math.prod(kind.shape))
        if sum(numels) * itemsize >= CACHED_BYTES or number == len(kinds):
            yield Piece(start, start + sum(numels), tuple(kinds[first:number]), tuple(numels))
            start, first, numels = start + sum(numels), number, []


def _difference(wanted: Sequence[Kind], brought: Sequence[Kind]) -> str:
    ours, theirs = ({(kind.variant, kind.name): kind for kind in kinds} for kinds in (wanted, brought))
    missing, strange = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    if missing or strange:
        return f"{len(missing)} missing {missing[:3]}, {len(strange)} strange {strange[:3]}"
    own, sent = next((ours[key], theirs[key]) for key in ours if ours[key] != theirs[key])
    return f"{own.variant} {own.name} is {sent.dtype} {list(sent.shape)}, not {own.dtype} {list(own.shape)}"
