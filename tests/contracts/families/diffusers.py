"""The fallback, on pipelines that have families of their own too, by the steps of Euler and DDIM."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case
from tests.contracts.families.pixart import lora_by_peft, pixart_folder
from tests.models.stable_diffusion import sd_folder
from tests.tiny import sd3_folder


class PlainPipeline:
    """With its call's defaults, except in size and steps."""

    def __init__(self, folder: Path, call: dict[str, Any]) -> None:
        self.pipeline, self.call = DiffusionPipeline.from_pretrained(folder), call
        self.pipeline.set_progress_bar_config(disable=True)
        own = self.pipeline.scheduler
        if not isinstance(own, FlowMatchEulerDiscreteScheduler):
            spacing = "trailing" if own.config.timestep_spacing == "linspace" else own.config.timestep_spacing
            config = {"clip_sample": False, "timestep_spacing": spacing}
            self.pipeline.scheduler = DDIMScheduler.from_config(own.config, **config)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 4, 8, 8), steps, 1.0)
        own = self.pipeline.scheduler
        if isinstance(own, FlowMatchEulerDiscreteScheduler):
            return own.sigmas, own.timesteps
        signal = torch.cat([own.alphas_cumprod[own.timesteps], own.final_alpha_cumprod[None]])
        return (1 - signal.double()).sqrt().float(), own.timesteps

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
            **self.call,
        ).images

    def load_lora(self, folder: Path) -> None:
        if hasattr(self.pipeline, "load_lora_weights"):
            self.pipeline.load_lora_weights(folder)
        else:
            lora_by_peft(self.pipeline.transformer, folder)


def fallback(write: Any, vp: bool, **call: Any) -> Case:
    return Case(
        module="diffusers", write=write, plain=lambda folder: PlainPipeline(folder, call), size=Size(16, 16), vp=vp
    )


CASES = {
    "diffusers-sd": fallback(sd_folder, vp=True),
    "diffusers-sd3": fallback(lambda folder: sd3_folder(folder, t5=True), vp=False),
    "diffusers-pixart": fallback(pixart_folder, vp=True, use_resolution_binning=False),
}
