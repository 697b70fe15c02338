"""Qwen-Image (arXiv 2508.02324) through diffusers: a two-stream flow transformer on packed latents, guided by norm.

Tried with tiny random weights only, against diffusers' own pipeline; never with the published ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import QwenImagePipeline
from pydantic import Field
from torch import Tensor, nn

from rlalign.models import qwen_packed
from rlalign.models.base import PredictionType
from rlalign.models.flow_match import load_pipeline
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """What a run file may say about this family."""

    max_sequence_length: int = Field(default=512, ge=1, le=1024)
    """Text tokens, to which every prompt is padded; as the pipeline's call. Less is faster."""


@final
class Family:
    """One pipeline folder or Hub id. Everything is frozen and in evaluation mode until a policy says what trains."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = qwen_packed.LORA_TARGETS
    guide = staticmethod(qwen_packed.guide)

    def __init__(self, config: Config, pipeline: QwenImagePipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets: dict[str, nn.Module] = {"transformer": pipeline.transformer}

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        return Family(config, load_pipeline(QwenImagePipeline, path, dtype).to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C] and mask [P, T] of the tokens that are there; guided away from " " by default."""
        texts, negatives = [prompt.text for prompt in prompts], [prompt.negative or " " for prompt in prompts]
        return self._encode(texts), self._encode(negatives)

    def _encode(self, texts: list[str]) -> Cond:
        length = self.config.max_sequence_length
        embeds, mask = self.pipeline.encode_prompt(texts, max_sequence_length=length)
        return qwen_packed.padded(embeds, mask, length)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(tokens, C): patches of 2 x 2 latents, row by row."""
        return qwen_packed.packed_shape(self.pipeline, size)

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The scheduler's table, shifted for as many tokens as the picture has."""
        return qwen_packed.packed_schedule(self.pipeline, steps, size)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity noise - clean [B, tokens, C]."""
        return qwen_packed.velocity(self.nets["transformer"], x, time, cond, [qwen_packed.grid(self.pipeline, size)])

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, tokens, C] -> [B, 3, H, W] in [0, 1]."""
        return qwen_packed.decode_packed(self.pipeline, latents, size)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, tokens, C]: the mean of the VAE's posterior."""
        return qwen_packed.encode_packed(self.pipeline, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        QwenImagePipeline(**{**self.pipeline.components, **merged(self.nets)}).save_pretrained(folder)
