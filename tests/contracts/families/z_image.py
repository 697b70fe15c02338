"""Z-Image: time from the noise, the opposite of the velocity, texts of their own lengths."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen3Model

from rlalign.types import Prompt, Size
from tests.contracts.families import qwen3
from tests.contracts.families.case import Case
from tests.tiny import vae

SIZE = Size(16, 24)
TOKENS = 16


class PlainZImage:
    def __init__(self, folder: Path) -> None:
        self.pipeline = ZImagePipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 4, 8, 12), steps, 1.0)
        return self.pipeline.scheduler.sigmas, self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        return self.pipeline(
            prompt=[prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            guidance_scale=guidance - 1,
            latents=latents,
            num_inference_steps=steps,
            height=SIZE.height,
            width=SIZE.width,
            max_sequence_length=TOKENS,
            output_type="pt",
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 32, 32],
    )


def z_image(scheduler: dict[str, Any]) -> Case:
    def write(folder: Path) -> Path:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ZImagePipeline(
                scheduler=FlowMatchEulerDiscreteScheduler(**scheduler),
                vae=vae(4),
                text_encoder=Qwen3Model(qwen3.config(2)),
                tokenizer=qwen3.tokenizer(),
                transformer=transformer(),
            ).save_pretrained(folder)
        return folder

    return Case(module="z_image", write=write, plain=PlainZImage, size=SIZE, config={"max_sequence_length": TOKENS})


CASES = {"z_image": z_image({"shift": 3.0})}
