"""Adapters of the forward algorithms."""

from ..cases import Adapter

KERNELS: dict[tuple[str, str], Adapter] = {}
