"""Adapters of the trajectory algorithms."""

from ..cases import Adapter

KERNELS: dict[tuple[str, str], Adapter] = {}
