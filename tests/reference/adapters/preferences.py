"""Adapters of the preferences algorithms."""

from ..cases import Adapter

KERNELS: dict[tuple[str, str], Adapter] = {}
