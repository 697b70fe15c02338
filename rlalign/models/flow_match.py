"""What families share that diffusers samples by FlowMatchEulerDiscreteScheduler with a shift by size."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from rlalign.types import Schedule


def load_pipeline(kind: Any, path: str, dtype: torch.dtype, **parts: Any) -> Any:
    """A pipeline of that class; the VAE stays in float32: its half-precision decoding is not worth the memory."""
    try:
        return kind.from_pretrained(path, dtype={"vae": torch.float32, "default": dtype}, **parts)
    except (OSError, ValueError) as error:  # no such folder or id; parts missing
        raise ValueError(f"no {kind.__name__} could be loaded from {path!r}: {error}") from error


def shifted_schedule(
    config: Any, steps: int, tokens: int, *, sigmas: Sequence[float] | None = None, mu: float | None = None
) -> Schedule:
    """Levels 1 ... 1/N, shifted by the scheduler's configuration, dynamically for that many tokens of a sample.

    A pipeline that rounds the levels otherwise, or has another rule for the dynamic shift, says its own.
    """
    if config.shift_terminal and steps == 1:
        raise ValueError(
            "rollout.num_steps 1: this model's scheduler has a shift_terminal, which needs 2 steps or more"
        )
    keys = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    own = calculate_shift(tokens, *(config.get(key, default) for key, default in keys.items()))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    levels: Any = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
    scheduler.set_timesteps(sigmas=levels, mu=own if mu is None else mu)
    time = torch.cat([scheduler.timesteps, scheduler.timesteps.new_zeros(1)])
    return Schedule(1 - scheduler.sigmas, scheduler.sigmas, time)
