"""FLUX.1 Kontext (arXiv 2506.15742) through diffusers: makes an image out of a text and the prompt's own image.

That image is fitted into the size of the sample, where the pipeline by itself would take one of the model's preferred
sizes of about a million pixels for it. Tried with tiny random weights only, against diffusers' own pipeline; never with
the published ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import FluxKontextPipeline
from pydantic import Field
from torch import Tensor, nn

from rlalign.models import flux_packed
from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.flow_match import load_pipeline
from rlalign.models.images import shown
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """What a run file may say about this family."""

    guidance: float = Field(default=2.5, ge=0)
    """What the net is told as its guidance scale, at no cost. `rollout.guidance_scale` is another one, true guidance
    away from the negative prompt by a second pass, and 1 in ordinary use."""
    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """Text tokens of T5, to which every prompt is padded; as the pipeline's call."""


@final
class Family:
    """One pipeline folder or Hub id. Everything is frozen and in evaluation mode until a policy says what trains."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = (*flux_packed.LORA_TARGETS, "proj_mlp")  # as flow_grpo
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, pipeline: FluxKontextPipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets: dict[str, nn.Module] = {"transformer": pipeline.transformer}

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        return Family(config, load_pipeline(FluxKontextPipeline, path, dtype).to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C] of T5, pooled [P, C] of CLIP, and reference [P, tokens, C], the image's latents."""
        length = self.config.max_sequence_length
        reference = flux_packed.encode_packed(self.pipeline, shown(prompts)).to(self.pipeline.transformer.dtype)
        cond = flux_packed.encode_texts(self.pipeline, [prompt.text for prompt in prompts], length)
        uncond = flux_packed.encode_texts(self.pipeline, [prompt.negative or "" for prompt in prompts], length)
        return cond | {"reference": reference}, uncond | {"reference": reference}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(tokens, C): patches of 2 x 2 latents, row by row."""
        return flux_packed.packed_shape(self.pipeline, size)

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The scheduler's table, shifted for as many tokens as the picture has."""
        return flux_packed.packed_schedule(self.pipeline, steps, size)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity noise - clean [B, tokens, C]."""
        net, guidance = self.nets["transformer"], self.config.guidance
        return flux_packed.velocity(self.pipeline, net, x, time, cond, size, guidance)

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, tokens, C] -> [B, 3, H, W] in [0, 1]."""
        return flux_packed.decode_packed(self.pipeline, latents, size)

    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, tokens, C]: the mean of the VAE's posterior."""
        return flux_packed.encode_packed(self.pipeline, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        FluxKontextPipeline(**{**self.pipeline.components, **merged(self.nets)}).save_pretrained(folder)
