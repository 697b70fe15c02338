"""PixArt-Sigma (arXiv 2403.04692) through diffusers: a transformer that predicts noise, told the prompt by T5 alone.

Tried with tiny random weights only, against diffusers' own pipeline; never with the published ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline
from pydantic import Field
from torch import Tensor, nn

from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.flow_match import load_pipeline
from rlalign.models.images import decoded, encoded, from_scheduler, image_shape
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """What a run file may say about this family."""

    max_sequence_length: int = Field(default=300, ge=1, le=300)
    """Text tokens of T5, to which every prompt is padded; as the pipeline's call."""
    clean_caption: bool = False
    """Clean prompts as the training captions were, which needs the packages bs4 and ftfy; else only lower case."""


@final
class Family:
    """One pipeline folder or Hub id. Images are made at the size that is asked for, without the pipeline's bins."""

    lora_targets: tuple[str, ...] = (  # as PixArt's own script in the blocks; it adapts embeddings as well
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("ff.net.0.proj", "ff.net.2"),
    )
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, pipeline: PixArtSigmaPipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets: dict[str, nn.Module] = {"transformer": pipeline.transformer}
        self.prediction: PredictionType = pipeline.scheduler.config.prediction_type  # epsilon, as published

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        pipeline = load_pipeline(PixArtSigmaPipeline, path, dtype)
        if pipeline.transformer.use_additional_conditions:
            raise ValueError(f"{path!r} is a PixArt-Alpha, which is told size and aspect ratio; use PixArt-Sigma")
        return Family(config, pipeline.to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C] and mask [P, T] of the tokens that are there."""
        embeds, mask, uncond_embeds, uncond_mask = self.pipeline.encode_prompt(
            [prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            clean_caption=self.config.clean_caption,
            max_sequence_length=self.config.max_sequence_length,
        )
        cond = {"prompt_embeds": embeds, "mask": mask.bool()}
        return cond, {"prompt_embeds": uncond_embeds, "mask": uncond_mask.bool()}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        net = self.pipeline.transformer.config
        return image_shape(size, net.in_channels, self.pipeline.vae_scale_factor, net.patch_size)

    def schedule(self, steps: int, size: Size) -> Schedule:
        """DPM-Solver's levels on the pipeline's table of training times; its own steps are `solver: dpmpp_2m`."""
        scheduler = DPMSolverMultistepScheduler.from_config(self.pipeline.scheduler.config)
        scheduler.set_timesteps(steps)
        return from_scheduler(scheduler)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """In terms of ``prediction`` [B, C, h, w]; the learned variance beside it is dropped."""
        output = self.nets["transformer"](
            x,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["mask"],
            timestep=time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]."""
        return decoded(self.pipeline.vae, latents)

    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w]: the mean of the VAE's posterior."""
        return encoded(self.pipeline.vae, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        PixArtSigmaPipeline(**{**self.pipeline.components, **merged(self.nets)}).save_pretrained(folder)
