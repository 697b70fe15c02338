"""LTX-Video (arXiv 2501.00103), text to video, through diffusers: a flow transformer on packed latents.

Tried with tiny random weights only, against diffusers' own pipeline; never with the published ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import LTXPipeline
from pydantic import Field
from torch import Tensor, nn

from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.flow_match import load_pipeline, shifted_schedule
from rlalign.models.lora import freeze, merged
from rlalign.models.video import latent_axes
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """What a run file may say about this family."""

    max_sequence_length: int = Field(default=128, ge=1, le=512)
    """Text tokens, to which every prompt is padded."""
    frame_rate: int = Field(default=25, ge=1)
    """Frames a second that the net is told."""
    decode_timestep: float = Field(default=0.0, ge=0, le=1)
    """What a decoder conditioned on time is told; unlike the pipeline's, its latents get no noise."""


@final
class Family:
    """One pipeline folder or Hub id. Everything is frozen and in evaluation mode until a policy says what trains."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # as finetrainers
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, pipeline: LTXPipeline) -> None:
        if any(pipeline.vae.config.decoder_inject_noise):
            raise ValueError("this model's VAE draws noise while it decodes: a sample would have no certain reward")
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets: dict[str, nn.Module] = {"transformer": pipeline.transformer}
        self.patches = pipeline.transformer_spatial_patch_size, pipeline.transformer_temporal_patch_size
        self.factors = pipeline.vae_spatial_compression_ratio, pipeline.vae_temporal_compression_ratio

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        return Family(config, load_pipeline(LTXPipeline, path, dtype).to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C] and mask [P, T] of the tokens that are there."""
        embeds, mask, uncond_embeds, uncond_mask = self.pipeline.encode_prompt(
            [prompt.text for prompt in prompts],
            [prompt.negative or "" for prompt in prompts],
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"prompt_embeds": embeds, "mask": mask}, {"prompt_embeds": uncond_embeds, "mask": uncond_mask}

    def _axes(self, size: Size) -> tuple[int, int, int]:
        return latent_axes(size, *self.factors, self.patches[0])

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(tokens, C): frame by frame, row by row."""
        (frames, height, width), (side, time) = self._axes(size), self.patches
        return (frames // time) * (height // side) * (width // side), self.pipeline.transformer.config.in_channels

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The scheduler's table, shifted for as many latents as the film has."""
        frames, height, width = self._axes(size)
        return shifted_schedule(self.pipeline.scheduler.config, steps, frames * height * width)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity noise - clean [B, tokens, C]."""
        space, frames = self.factors
        scale = (frames / self.config.frame_rate, space, space)
        text = cond["prompt_embeds"], time, cond["mask"]
        return self.nets["transformer"](x, *text, *self._axes(size), scale, return_dict=False)[0]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, tokens, C] -> [B, F, 3, H, W] in [0, 1], of a single frame [B, 3, H, W]."""
        pipeline, vae = self.pipeline, self.pipeline.vae
        unpacked = pipeline._unpack_latents(latents, *self._axes(size), *self.patches)
        scaled = pipeline._denormalize_latents(unpacked, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        told = latents.new_full((len(latents),), self.config.decode_timestep, dtype=vae.dtype)
        video = vae.decode(scaled.to(vae.dtype), told if vae.config.timestep_conditioning else None, return_dict=False)
        return (video[0] / 2 + 0.5).clamp(0, 1).transpose(1, 2).squeeze(1)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, (F,) 3, H, W] in [0, 1] -> [B, tokens, C]: the mean of the VAE's posterior."""
        pipeline, vae = self.pipeline, self.pipeline.vae
        video = (pixels if pixels.ndim == 5 else pixels[:, None]).transpose(1, 2)  # [B, 3, F, H, W]
        mean = vae.encode((2 * video - 1).to(vae.device, vae.dtype)).latent_dist.mean
        scaled = pipeline._normalize_latents(mean, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        return pipeline._pack_latents(scaled, *self.patches)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        LTXPipeline(**{**self.pipeline.components, **merged(self.nets)}).save_pretrained(folder)
