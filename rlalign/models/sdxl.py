"""Stable Diffusion XL (arXiv 2307.01952) through diffusers: a UNet with two text encoders that is told the size.

Tried with tiny random weights only, against diffusers' own pipeline; never with the published ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn

from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.flow_match import load_pipeline
from rlalign.models.images import decoded, encoded, from_scheduler, image_shape
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """This family has no settings."""


@final
class Family:
    """One pipeline folder or Hub id, without watermark. Everything is frozen until a policy says what trains."""

    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # as diffusers' scripts for SDXL
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, pipeline: StableDiffusionXLPipeline) -> None:
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        encoders = {name: pipeline.components[name] for name in ("text_encoder", "text_encoder_2")}
        self.nets: dict[str, nn.Module] = {"unet": pipeline.unet, **encoders}
        self.prediction: PredictionType = pipeline.scheduler.config.prediction_type  # epsilon, as published

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        """The VAE stays in float32, in half precision the published one overflows."""
        return Family(load_pipeline(StableDiffusionXLPipeline, path, dtype, add_watermarker=False).to(device))

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C] and pooled [P, C]; zeros for no negative prompt, where the pipeline says so."""
        embeds, uncond_embeds, pooled, uncond_pooled = self.pipeline.encode_prompt(
            [prompt.text for prompt in prompts], negative_prompt=[prompt.negative or "" for prompt in prompts]
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            blank = [row for row, prompt in enumerate(prompts) if prompt.negative is None]
            uncond_embeds[blank], uncond_pooled[blank] = 0, 0
        return {"prompt_embeds": embeds, "pooled": pooled}, {"prompt_embeds": uncond_embeds, "pooled": uncond_pooled}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return image_shape(size, self.pipeline.unet.config.in_channels, self.pipeline.vae_scale_factor)

    def schedule(self, steps: int, size: Size) -> Schedule:
        """Euler's levels on the pipeline's table of training times, whatever scheduler the pipeline has itself."""
        scheduler = EulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        return from_scheduler(scheduler)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """In terms of ``prediction`` [B, C, h, w], for an image of this size that nothing was cut off."""
        pooled, shape = cond["pooled"], (size.height, size.width)
        ids = self.pipeline._get_add_time_ids(shape, (0, 0), shape, x.dtype, pooled.shape[1])
        added = {"text_embeds": pooled, "time_ids": ids.to(x.device).expand(len(x), -1)}
        net = self.nets["unet"]
        return net(x, time, cond["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]."""
        return decoded(self.pipeline.vae, latents)

    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w]: the mean of the VAE's posterior."""
        return encoded(self.pipeline.vae, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        zeros: bool = self.pipeline.config.force_zeros_for_empty_prompt
        parts = {**self.pipeline.components, **merged(self.nets)}
        plain = StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
        plain.save_pretrained(folder)
