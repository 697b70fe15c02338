"""Stable Diffusion 3, with and without T5, and with dynamic shifting."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case
from tests.tiny import sd3_folder


class PlainSD3:
    def __init__(self, folder: Path, max_sequence_length: int, t5: bool, size: Size) -> None:
        without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without)
        self.pipeline.set_progress_bar_config(disable=True)
        self.max_sequence_length, self.size = max_sequence_length, size

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 4, 8, 8), steps, 1.0)
        return self.pipeline.scheduler.sigmas, self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        return self.pipeline(
            prompt=[prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            latents=latents,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=self.size.height,
            width=self.size.width,
            max_sequence_length=self.max_sequence_length,
            output_type="pt",
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def sd3(tokens: int, *, t5: bool = False, scheduler: dict[str, Any] | None = None) -> Case:
    size = Size(16, 16)
    return Case(
        module="sd3",
        write=lambda folder: sd3_folder(folder, t5=t5, scheduler=scheduler),
        plain=lambda folder: PlainSD3(folder, tokens, t5, size),
        size=size,
        config={"text_encoder_3": t5, "max_sequence_length": tokens},
    )


CASES = {
    "sd3-clip": sd3(0),
    "sd3-zeros": sd3(256),
    "sd3-t5": sd3(16, t5=True),
    "sd3-dynamic": sd3(0, scheduler={"use_dynamic_shifting": True, "max_shift": 2.0, "base_image_seq_len": 4}),
}
