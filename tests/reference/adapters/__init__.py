"""Adapters by (kernel, source): from a case's inputs, through rlalign's own functions, to the public code's outputs."""

from ..cases import Adapter
from . import forward, kernels, losses, preferences, trajectory

ADAPTERS: dict[tuple[str, str], Adapter] = {
    key: adapter
    for part in (kernels, losses, trajectory, forward, preferences)
    for key, adapter in part.KERNELS.items()
}

OUT_OF_SCOPE: dict[tuple[str, str], str] = {
    ("sde_step_choice", "Flow-Factory"): "depends on another project's random stream",
    ("time_sampler", "Flow-Factory"): "depends on another project's random stream",
    ("k_repeat_sampler", "flow_grpo"): "depends on another project's random stream",
}
"""Kernels that stay undecided, with the reason."""
