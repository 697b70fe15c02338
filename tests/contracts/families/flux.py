"""FLUX.1: dev is told its guidance and shifts its levels by the size, schnell does neither."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case
from tests.tiny import clip_tokenizer, t5_encoder, t5_tokenizer, vae

SIZE = Size(16, 24)
TOKENS, WIDTH = 16, 16
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_shift": 2.0}


class PlainFlux:
    def __init__(self, folder: Path, guidance: float) -> None:
        self.pipeline = FluxPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.guidance = guidance

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 24, 16), steps, 1.0)
        return self.pipeline.scheduler.sigmas, self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        return self.pipeline(
            prompt=[prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            true_cfg_scale=guidance,
            guidance_scale=self.guidance,
            latents=latents,
            num_inference_steps=steps,
            height=SIZE.height,
            width=SIZE.width,
            max_sequence_length=TOKENS,
            output_type="pt",
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def clip() -> CLIPTextModel:
    tokenizer = clip_tokenizer(8)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        initializer_factor=5.0,
        **ids,
    )
    return CLIPTextModel(config)


def transformer(told: bool) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=told,
        axes_dims_rope=(2, 2, 4),
    )


def parts(told: bool, scheduler: dict[str, Any]) -> dict[str, Any]:
    """Of a pipeline of tiny random nets, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "scheduler": FlowMatchEulerDiscreteScheduler(**scheduler),
            "vae": vae(4),
            "text_encoder": clip(),
            "tokenizer": clip_tokenizer(8),
            "text_encoder_2": t5_encoder(WIDTH),
            "tokenizer_2": t5_tokenizer(),
            "transformer": transformer(told),
        }


def flux(told: bool, guidance: float, scheduler: dict[str, Any]) -> Case:
    def write(folder: Path) -> Path:
        FluxPipeline(**parts(told, scheduler)).save_pretrained(folder)
        return folder

    return Case(
        module="flux",
        write=write,
        plain=lambda folder: PlainFlux(folder, guidance),
        size=SIZE,
        config={"max_sequence_length": TOKENS, "guidance": guidance},
    )


CASES = {"flux-dev": flux(True, 2.5, DYNAMIC), "flux-schnell": flux(False, 0.0, {})}
