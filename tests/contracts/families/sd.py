"""Stable Diffusion 1, which predicts the noise, and 2, which predicts v, each with another of DDIM's grids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case
from tests.models.stable_diffusion import sd_folder


class PlainSD:
    def __init__(self, folder: Path) -> None:
        without = {"safety_checker": None, "requires_safety_checker": False}
        self.pipeline = StableDiffusionPipeline.from_pretrained(folder, **without)
        self.pipeline.set_progress_bar_config(disable=True)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 4, 8, 8), steps, 1.0)
        scheduler = self.pipeline.scheduler
        signal = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])
        return (1 - signal.double()).sqrt().float(), scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        return self.pipeline(
            prompt=[prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            latents=latents,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=16,
            width=16,
            output_type="pt",
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def sd(**scheduler: Any) -> Case:
    return Case(module="sd", write=lambda f: sd_folder(f, **scheduler), plain=PlainSD, size=Size(16, 16), vp=True)


CASES = {
    "sd-epsilon": sd(set_alpha_to_one=False),
    "sd-v_prediction": sd(prediction_type="v_prediction", timestep_spacing="trailing"),
}
