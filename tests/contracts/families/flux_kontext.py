"""FLUX.1 Kontext: as FLUX.1, with the tokens of an image beside those of the sample."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxKontextPipeline
from torch import Tensor

from rlalign.types import Prompt
from tests.contracts.families.case import Case
from tests.contracts.families.flux import DYNAMIC, SIZE, TOKENS, parts


class PlainKontext:
    def __init__(self, folder: Path) -> None:
        self.pipeline = FluxKontextPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 24, 16), steps, 1.0)
        return self.pipeline.scheduler.sigmas, self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        images = [prompt.image.float() / 255 for prompt in prompts if prompt.image is not None]
        return self.pipeline(
            image=torch.stack(images) if images else None,
            prompt=[prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            true_cfg_scale=guidance,
            guidance_scale=2.5,
            latents=latents,
            num_inference_steps=steps,
            height=SIZE.height,
            width=SIZE.width,
            max_area=SIZE.height * SIZE.width,
            max_sequence_length=TOKENS,
            output_type="pt",
            _auto_resize=False,
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def written(folder: Path) -> Path:
    FluxKontextPipeline(**parts(True, DYNAMIC)).save_pretrained(folder)
    return folder


CASES = {
    "flux_kontext": Case(
        module="flux_kontext",
        write=written,
        plain=PlainKontext,
        size=SIZE,
        config={"max_sequence_length": TOKENS},
        images=True,
    )
}
