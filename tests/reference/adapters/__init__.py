"""Adapters by (kernel, source): from a case's inputs, through rlalign's own functions, to the public code's outputs."""

from ..cases import Adapter
from . import kernels, losses

ADAPTERS: dict[tuple[str, str], Adapter] = {**kernels.KERNELS, **losses.KERNELS}

OUT_OF_SCOPE: dict[tuple[str, str], str] = {
    ("sde_step_choice", "Flow-Factory"): "depends on another project's random stream",
    ("time_sampler", "Flow-Factory"): "depends on another project's random stream",
    ("k_repeat_sampler", "flow_grpo"): "depends on another project's random stream",
}
"""Kernels that stay undecided, with the reason."""
