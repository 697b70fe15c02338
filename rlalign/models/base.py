"""The model interface: a family encodes prompts, predicts once, decodes. Loop, log-probs and LoRA are not its business.

A family is one file in this folder. It defines a pydantic ``Config`` and one final class named ``Family`` built by
``Family.load(config, path, dtype, device)``. ``rlalign.plugins`` finds it by the file's name.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rlalign.types import Cond, Prompt, Schedule, Size

PredictionType = Literal["velocity", "epsilon", "sample", "v_prediction"]


class Unusable(ValueError):
    """What this model cannot do for a run: a prompt, guidance, or steps that train none of its nets; one sentence."""


class Family(Protocol):
    prediction: PredictionType
    lora_targets: tuple[str, ...]  # module names, as peft's target_modules
    nets: dict[str, nn.Module]  # what can be trained, by name; the first is trained unless the run file says otherwise

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """Conditional and unconditional embeddings, each tensor [P, ...], padded to a fixed length.

        A gradient only where a text encoder is among the nets and trains.
        """
        ...

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """*L of one sample of that size; ValueError for a size the model cannot make."""
        ...

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The model's own grid for that many steps, as its diffusers scheduler tabulates it."""
        ...

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """One pass of the trained net: x [B, *L], time [B], cond each [B, ...] -> [B, *L] in ``prediction``'s terms."""
        ...

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Combines the two predictions [B, *L]; classifier-free guidance unless the family knows better."""
        ...

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, *L] -> pixels [B, 3, H, W] or [B, F, 3, H, W], float in [0, 1]."""
        ...

    def save_pipeline(self, folder: Path) -> None:
        """Writes the whole pipeline in the layout its library reads, with the nets' present weights."""
        ...


@runtime_checkable
class EncodesImages(Protocol):
    """What a family can do besides, which training on recorded images needs."""

    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """Pixels [B, 3, H, W], float in [0, 1] -> the latents [B, *L] that ``decode`` makes them of; no gradient."""
        ...


@runtime_checkable
class HasPipeline(Protocol):
    """A family around a pipeline of diffusers, whose parts can be moved and told to save memory (memory.py)."""

    pipeline: Any


def classifier_free_guidance(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """negative + scale * (positive - negative): arXiv 2207.12598."""
    return negative + scale * (positive - negative)


def torch_dtype(name: Literal["float32", "float16", "bfloat16", "float64"]) -> torch.dtype:
    return getattr(torch, name)
