"""PixArt-Sigma with its scheduler as published, DPM-Solver++ of second order, and with steps of first order.

Its pipeline loads no LoRA; adapters are put into its transformer by peft, as in PixArt's own instructions.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rlalign.models.lora import LORA_FILE
from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case
from tests.models.stable_diffusion import vae
from tests.tiny import t5_encoder, t5_tokenizer

WIDTH, TOKENS = 16, 12


def pixart_folder(folder: Path, **scheduler: Any) -> Path:
    """16x16 pixels, latents [4, 8, 8]; ``scheduler``: settings of DPMSolverMultistepScheduler."""
    table = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # as published
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = PixArtSigmaPipeline(
            transformer=PixArtTransformer2DModel(
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=2,
                cross_attention_dim=16,
                sample_size=8,
                caption_channels=WIDTH,
                use_additional_conditions=False,
            ),
            vae=vae(),
            text_encoder=t5_encoder(WIDTH),
            tokenizer=t5_tokenizer(),
            scheduler=DPMSolverMultistepScheduler(**{**table, **scheduler}),
        )
    pipeline.save_pretrained(folder)
    return folder


class PlainPixArt:
    def __init__(self, folder: Path) -> None:
        self.pipeline = PixArtSigmaPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 4, 8, 8), steps, 1.0)
        sigmas = self.pipeline.scheduler.sigmas.double()
        return (sigmas / (1 + sigmas.square()).sqrt()).float(), self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        return self.pipeline(
            prompt=[prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            latents=latents,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=16,
            width=16,
            max_sequence_length=TOKENS,
            clean_caption=False,
            use_resolution_binning=False,
            output_type="pt",
        ).images

    def load_lora(self, folder: Path) -> None:
        lora_by_peft(self.pipeline.transformer, folder)


def lora_by_peft(net: PixArtTransformer2DModel, folder: Path) -> None:
    with safe_open(folder / LORA_FILE, "pt") as file:
        own = json.loads(file.metadata()["lora_adapter_metadata"])
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / LORA_FILE).items()}
    inject_adapter_in_model(LoraConfig(**{name.removeprefix("transformer."): own[name] for name in own}), net)
    set_peft_model_state_dict(net, state)


def pixart(solver: str, **scheduler: Any) -> Case:
    return Case(
        module="pixart",
        write=lambda folder: pixart_folder(folder, **scheduler),
        plain=PlainPixArt,
        size=Size(16, 16),
        config={"max_sequence_length": TOKENS},
        vp=True,
        solver=solver,
    )


CASES = {"pixart": pixart("dpmpp_2m"), "pixart-first_order": pixart("euler", solver_order=1)}
