"""Adapters by (kernel, source): from a case's inputs, through rlalign's own functions, to the public code's outputs."""

from importlib import import_module
from importlib.util import find_spec

from ..cases import Adapter

ADAPTERS: dict[tuple[str, str], Adapter] = {}
for part in ("kernels", "losses"):
    if find_spec(f"{__name__}.{part}"):
        ADAPTERS |= import_module(f"{__name__}.{part}").KERNELS

OUT_OF_SCOPE: dict[tuple[str, str], str] = {
    ("sde_step_choice", "Flow-Factory"): "depends on another project's random stream",
    ("time_sampler", "Flow-Factory"): "depends on another project's random stream",
    ("k_repeat_sampler", "flow_grpo"): "depends on another project's random stream",
}
