"""LTX-Video: packed latents of a film, text behind a mask, a dynamic shift with a terminal level."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
from torch import Tensor

from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case
from tests.tiny import t5_encoder, t5_tokenizer

SIZE = Size(32, 64, 5)
TOKENS = 16


class PlainLTX:
    def __init__(self, folder: Path) -> None:
        self.pipeline = LTXPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 16, 4), steps, 1.0)
        return self.pipeline.scheduler.sigmas, self.pipeline.scheduler.timesteps

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


def transformer() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )


def vae(timestep_conditioning: bool = False) -> AutoencoderKLLTXVideo:
    """A latent is 16 x 16 pixels and four frames, but for the first one."""
    made = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        timestep_conditioning=timestep_conditioning,
        scaling_factor=0.9,
    )
    made.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    made.latents_std.copy_(torch.tensor([1.1, 0.9, 1.2, 0.8]))
    return made


def written(folder: Path, *, timestep_conditioning: bool = False) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LTXPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_image_seq_len=4, max_shift=2.0, shift_terminal=0.1
            ),
            vae=vae(timestep_conditioning),
            text_encoder=t5_encoder(16),
            tokenizer=t5_tokenizer(),
            transformer=transformer(),
        ).save_pretrained(folder)
    return folder


CASES = {
    "ltx": Case(
        module="ltx",
        write=written,
        plain=PlainLTX,
        size=SIZE,
        config={"max_sequence_length": TOKENS},
        least_steps=2,
    )
}
