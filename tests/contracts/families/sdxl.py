"""Stable Diffusion XL, whose pipeline zeroes the embedding of no negative prompt, and a finetune by v-prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor

from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case
from tests.models.stable_diffusion import TOKENS, WIDTH, text_encoder, unet, vae
from tests.tiny import clip, clip_tokenizer

POOLED, TIME = 8, 8


def sdxl_folder(folder: Path, zeros: bool, **scheduler: Any) -> Path:
    """16x16 pixels, latents [4, 8, 8]; ``scheduler``: settings of EulerDiscreteScheduler."""
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # as published
    grid = {"timestep_spacing": "leading", "steps_offset": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            unet=unet(
                cross_attention_dim=WIDTH + POOLED,
                transformer_layers_per_block=1,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=TIME,
                projection_class_embeddings_input_dim=6 * TIME + POOLED,
            ),
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=clip_tokenizer(TOKENS),
            text_encoder_2=clip(POOLED, TOKENS),
            tokenizer_2=clip_tokenizer(TOKENS),
            scheduler=EulerDiscreteScheduler(**{**table, **grid, **scheduler}),
            force_zeros_for_empty_prompt=zeros,
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


class PlainSDXL:
    """One prompt at a time: the pipeline has zeros for all prompts of a call or for none."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
        self.pipeline.set_progress_bar_config(disable=True)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 4, 8, 8), steps, 1.0)
        sigmas = self.pipeline.scheduler.sigmas.double()
        return (sigmas / (1 + sigmas.square()).sqrt()).float(), self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        images = [self._draw(*one, steps, guidance) for one in zip(prompts, latents.split(1), strict=True)]
        return torch.cat(images)

    def _draw(self, prompt: Prompt, latents: Tensor, steps: int, guidance: float) -> Tensor:
        return self.pipeline(
            prompt=prompt.text,
            negative_prompt=prompt.negative,
            latents=latents,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=16,
            width=16,
            output_type="pt",
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def sdxl(zeros: bool, **scheduler: Any) -> Case:
    return Case(
        module="sdxl",
        write=lambda folder: sdxl_folder(folder, zeros, **scheduler),
        plain=PlainSDXL,
        size=Size(16, 16),
        vp=True,
    )


CASES = {
    "sdxl": sdxl(zeros=True),
    "sdxl-v_prediction": sdxl(zeros=False, prediction_type="v_prediction", use_karras_sigmas=True),
}
