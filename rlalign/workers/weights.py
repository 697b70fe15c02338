"""Published weights: the tensors of one version with what a receiver needs to see that all of them arrived."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    version: int
    variants: dict[str, dict[str, Tensor]]  # "policy" | "old" | "ema" -> parameter name -> tensor
    count: int
    num_bytes: int
    checksum: int  # crc32 over names and bytes

    @staticmethod
    def pack(version: int, variants: dict[str, dict[str, Tensor]]) -> "Weights":
        count, num_bytes, checksum = _measure(variants)
        return Weights(version, variants, count, num_bytes, checksum)

    def verify(self) -> None:
        """ValueError when there is nothing in it, or not what was packed."""
        if self.count == 0:
            raise ValueError(f"weights of version {self.version} hold no tensors: nothing would reach the samplers")
        if (self.count, self.num_bytes, self.checksum) != _measure(self.variants):
            raise ValueError(f"weights of version {self.version} were damaged on the way: checksum or size differs")


def _measure(variants: dict[str, dict[str, Tensor]]) -> tuple[int, int, int]:
    count = num_bytes = checksum = 0
    for variant in sorted(variants):
        for name, tensor in sorted(variants[variant].items()):
            data: Any = tensor.detach().cpu().contiguous().flatten().view(dtype=torch.uint8).numpy()
            checksum = zlib.crc32(data, zlib.crc32(f"{variant}/{name}".encode(), checksum))
            count, num_bytes = count + 1, num_bytes + data.nbytes
    return count, num_bytes, checksum
