"""Wan: 2.1 with Euler's scheduler, and 2.2 with two experts and UniPC of first order, which is Euler on its levels."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case
from tests.tiny import t5_tokenizer

SIZE = Size(16, 32, 5)
TOKENS = 16


class PlainWan:
    def __init__(self, folder: Path) -> None:
        self.pipeline = WanPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 4, 2, 2, 4), steps, 1.0)
        return from_one(self.pipeline.scheduler.sigmas), self.pipeline.scheduler.timesteps.float()

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        return self.pipeline(
            prompt=[prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            guidance_scale=guidance,
            latents=latents,
            num_inference_steps=steps,
            height=SIZE.height,
            width=SIZE.width,
            num_frames=SIZE.frames,
            max_sequence_length=TOKENS,
            output_type="pt",
        ).frames

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def from_one(sigmas: Tensor) -> Tensor:
    """UniPC's begin a millionth below, which is for its own arithmetic alone."""
    return torch.cat([torch.ones(1), sigmas[1:]])


def text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, initializer_factor=5.0)
    return UMT5EncoderModel(config)


def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def vae() -> AutoencoderKLWan:
    """A latent is 8 x 8 pixels and four frames, but for the first one."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.2, 0.8],
    )


def euler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def unipc() -> UniPCMultistepScheduler:
    """As the published ones, but of first order and without corrector."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=1,
        disable_corrector=list(range(10)),
    )


def written(folder: Path, *, experts: int = 1, expand_timesteps: bool = False) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = [transformer() for _ in range(experts)]
        WanPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=text_encoder(),
            vae=vae(),
            scheduler=euler() if experts == 1 else unipc(),
            transformer=nets[0],
            transformer_2=nets[1] if experts == 2 else None,
            boundary_ratio=0.875 if experts == 2 else None,
            expand_timesteps=expand_timesteps,
        ).save_pretrained(folder)
    return folder


CASES = {
    f"wan-{version}": Case(
        module="wan",
        write=lambda folder, experts=experts: written(folder, experts=experts),
        plain=PlainWan,
        size=SIZE,
        config={"max_sequence_length": TOKENS},
    )
    for version, experts in (("2.1", 1), ("2.2", 2))
}
