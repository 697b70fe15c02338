"""Stable Diffusion 1 and 2 (arXiv 2112.10752) through diffusers: a UNet on image latents, sampled by DDIM.

Tried with tiny random weights only, against diffusers' own pipeline; never with the published ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.flow_match import load_pipeline
from rlalign.models.images import decoded, encoded, from_ddim, image_shape
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """This family has no settings."""


@final
class Family:
    """One pipeline folder or Hub id, without safety checker. Everything is frozen until a policy says what trains."""

    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # as diffusers' scripts and ddpo-pytorch
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, pipeline: StableDiffusionPipeline) -> None:
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets: dict[str, nn.Module] = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
        self.prediction: PredictionType = pipeline.scheduler.config.prediction_type  # epsilon; v_prediction in 2.x

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        """The VAE stays in float32: its half-precision decoding is not worth the memory."""
        parts = {"safety_checker": None, "requires_safety_checker": False}
        return Family(load_pipeline(StableDiffusionPipeline, path, dtype, **parts).to(device))

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C], of the prompts and of what they are guided away from."""
        texts, negatives = [prompt.text for prompt in prompts], [prompt.negative or "" for prompt in prompts]
        device = self.pipeline.text_encoder.device
        embeds, uncond_embeds = self.pipeline.encode_prompt(texts, device, 1, True, negatives)
        return {"prompt_embeds": embeds}, {"prompt_embeds": uncond_embeds}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return image_shape(size, self.pipeline.unet.config.in_channels, self.pipeline.vae_scale_factor)

    def schedule(self, steps: int, size: Size) -> Schedule:
        """DDIM's levels on the pipeline's table of training times, whatever scheduler the pipeline has itself."""
        scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        return from_ddim(scheduler)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """In terms of ``prediction`` [B, C, h, w]."""
        return self.nets["unet"](x, time, cond["prompt_embeds"], return_dict=False)[0]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]."""
        return decoded(self.pipeline.vae, latents)

    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w]: the mean of the VAE's posterior."""
        return encoded(self.pipeline.vae, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        parts = {**self.pipeline.components, **merged(self.nets)}
        StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
