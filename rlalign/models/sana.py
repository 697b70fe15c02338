"""SANA (arXiv 2410.10629) through diffusers: a linear flow transformer on 32-fold compressed latents, text by Gemma 2.

Tried with tiny random weights only, against diffusers' own pipeline; never with the published ones.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline
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

    max_sequence_length: int = Field(default=300, ge=2, le=300)
    """Text tokens, to which every prompt is padded; as the pipeline's call."""
    instruction: bool = True
    """Ask Gemma to enrich the prompt, in the words of the pipeline; negative prompts are never enriched."""


@final
class Family:
    """One pipeline folder or Hub id. Images are made at the size that is asked for, without the pipeline's bins."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v")  # as diffusers' script
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, pipeline: SanaPipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets: dict[str, nn.Module] = {"transformer": pipeline.transformer}

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        pipeline = load_pipeline(SanaPipeline, path, dtype)
        if pipeline.transformer.config.guidance_embeds:
            raise ValueError(f"{path!r} is a SANA-Sprint, which is no flow model; use a SANA that is not distilled")
        return Family(config, pipeline.to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C] and mask [P, T] of the tokens that are there."""
        call = inspect.signature(SanaPipeline.__call__).parameters
        words: list[str] = call["complex_human_instruction"].default
        embeds, mask, uncond_embeds, uncond_mask = self.pipeline.encode_prompt(
            [prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            max_sequence_length=self.config.max_sequence_length,
            complex_human_instruction=words if self.config.instruction else None,
        )
        cond = {"prompt_embeds": embeds, "mask": mask.bool()}
        return cond, {"prompt_embeds": uncond_embeds, "mask": uncond_mask.bool()}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        net = self.pipeline.transformer.config
        return image_shape(size, net.in_channels, self.pipeline.vae_scale_factor, net.patch_size)

    def schedule(self, steps: int, size: Size) -> Schedule:
        """Euler's table; of a pipeline with DPM-Solver even levels with its shift, as there, but from 1 on exactly.

        DPM-Solver begins at 0.9997, where the noise of Flow-SDE is without bounds.
        """
        own: Any = self.pipeline.scheduler
        if isinstance(own, FlowMatchEulerDiscreteScheduler):
            scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(own.config)
            scheduler.set_timesteps(steps)
        else:
            scheduler = FlowMatchEulerDiscreteScheduler(shift=own.config.flow_shift)
            scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        return from_scheduler(scheduler)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity noise - clean [B, C, h, w]."""
        return self.nets["transformer"](
            x,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["mask"],
            timestep=time * self.pipeline.transformer.config.timestep_scale,
            return_dict=False,
        )[0]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]."""
        return decoded(self.pipeline.vae, latents)

    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w]."""
        return encoded(self.pipeline.vae, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        SanaPipeline(**{**self.pipeline.components, **merged(self.nets)}).save_pretrained(folder)
