"""SANA with flow matching's Euler steps, and with the published scheduler, in whose place the test puts Euler too."""

from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
)
from torch import Tensor
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case

WIDTH, TOKENS, SIDE = 16, 12, 32


def sana_folder(folder: Path, scheduler: Any) -> Path:
    """32x32 pixels, latents [4, 8, 8]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = SanaPipeline(
            transformer=SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=WIDTH,
                sample_size=8,
            ),
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=_tokenizer(),
            scheduler=scheduler,
        )
    pipeline.save_pretrained(folder)
    return folder


def _vae() -> AutoencoderDC:
    """A quarter of the sides."""
    ends: dict[str, Any] = {
        "layers_per_block": (1, 1, 1),
        "block_out_channels": (8, 8, 8),
        "qkv_multiscales": ((),) * 3,
    }
    both = {f"{end}_{name}": value for end in ("encoder", "decoder") for name, value in ends.items()}
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **both)


def _text_encoder() -> Gemma2Model:
    """Large numbers at the start of training already: at 0.02 the text hardly moves the picture."""
    config = Gemma2Config(
        vocab_size=len(_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.2,
    )
    return Gemma2Model(config)


def _tokenizer() -> GemmaTokenizer:
    """Letters."""
    symbols = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *ascii_lowercase]
    return GemmaTokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[])


class PlainSana:
    def __init__(self, folder: Path, instruction: bool) -> None:
        self.pipeline = SanaPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.more: dict[str, Any] = {} if instruction else {"complex_human_instruction": None}
        self.even = not isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
        if self.even:
            shift = self.pipeline.scheduler.config.flow_shift
            self.pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 4, 8, 8), steps, 1.0)
        return self.pipeline.scheduler.sigmas, self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        grid = {"sigmas": np.linspace(1, 1 / steps, steps)} if self.even else {"num_inference_steps": steps}
        return self.pipeline(
            prompt=[prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            latents=latents,
            guidance_scale=guidance,
            height=SIDE,
            width=SIDE,
            max_sequence_length=TOKENS,
            use_resolution_binning=False,
            output_type="pt",
            **grid,
            **self.more,
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def sana(instruction: bool, scheduler: Any) -> Case:
    return Case(
        module="sana",
        write=lambda folder: sana_folder(folder, scheduler),
        plain=lambda folder: PlainSana(folder, instruction),
        size=Size(SIDE, SIDE),
        config={"max_sequence_length": TOKENS, "instruction": instruction},
    )


PUBLISHED = DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
CASES = {
    "sana": sana(instruction=True, scheduler=PUBLISHED),
    "sana-euler": sana(instruction=False, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)),
}
