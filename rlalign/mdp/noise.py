"""Counter-based noise: every draw is a function of its address, whatever was drawn before, where and with what."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Noise:
    """Random numbers of a run. Row b of a batch depends on (seed, purpose, address[b], index) and on nothing else.

    Philox-4x64 under a 128-bit key hashed from the address, drawn on the CPU with numpy's Generator. float64 numbers
    are drawn as such and differ from the float32 ones; narrower types are rounded float32.
    """

    seed: int

    def normal(
        self, purpose: str, address: Tensor, index: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Standard normal numbers [B, *shape] for addresses [B, 3] int64 (step, group, sample)."""
        return self._rows("normal", purpose, address, index, shape, dtype, np.random.Generator.standard_normal)

    def uniform(
        self, purpose: str, address: Tensor, index: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Numbers in [0, 1) [B, *shape] for addresses [B, 3]."""
        return self._rows("uniform", purpose, address, index, shape, dtype, np.random.Generator.random)

    def integer(self, purpose: str, address: tuple[int, int, int], high: int) -> int:
        """A number in 0..high-1."""
        return int(self._generator("integer", purpose, address).integers(high))

    def permutation(self, purpose: str, address: tuple[int, int, int], n: int) -> Tensor:
        """The numbers 0..n-1 in random order [n] int64."""
        return torch.as_tensor(self._generator("permutation", purpose, address).permutation(n)).long()

    def _rows(
        self,
        kind: str,
        purpose: str,
        address: Tensor,
        index: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        draw: Callable[..., Any],
    ) -> Tensor:
        drawn = np.float64 if dtype == torch.float64 else np.float32
        rows = np.empty((len(address), prod(shape)), drawn)
        generator = np.random.Generator(np.random.Philox(key=0))  # one for all rows: its state is set, never carried on
        places = cast(list[tuple[int, int, int]], address.tolist())  # pyright: ignore[reportUnknownMemberType]
        for row, place in zip(rows, places, strict=True):
            generator.bit_generator.state = _fresh_state(self._key(kind, purpose, place, index))
            draw(generator, out=row, dtype=drawn)
        return torch.as_tensor(rows).reshape(len(address), *shape).to(dtype)

    def _generator(self, kind: str, purpose: str, address: tuple[int, int, int]) -> np.random.Generator:
        generator = np.random.Generator(np.random.Philox(key=0))
        generator.bit_generator.state = _fresh_state(self._key(kind, purpose, address, 0))
        return generator

    def _key(self, kind: str, purpose: str, address: tuple[int, int, int], index: int) -> bytes:
        step, group, sample = address
        name = f"{kind} {self.seed} {step} {group} {sample} {index} {purpose}"  # the only free text stands last
        return blake2b(name.encode(), digest_size=16).digest()


def _fresh_state(key: bytes) -> dict[str, Any]:
    """Philox at the start of the stream under this key."""
    return {
        "bit_generator": "Philox",
        "state": {"counter": np.zeros(4, np.uint64), "key": np.frombuffer(key, "<u8").astype(np.uint64)},
        "buffer": np.zeros(4, np.uint64),
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
