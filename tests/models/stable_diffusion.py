"""A random Stable Diffusion 1 pipeline, small enough to be built and run in a test: 16x16 pixels, latents [4, 8, 8]."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from rlalign.models import sd
from rlalign.models.lora import LoraConfig, attach, full
from rlalign.policy import Policy, RolloutConfig
from tests.tiny import clip_tokenizer, shaken

WIDTH, TOKENS = 16, 8


def sd_folder(folder: Path, seed: int = 0, **scheduler: Any) -> Path:
    """Writes the pipeline in float32; one seed gives the same weights. ``scheduler``: settings of DDIMScheduler."""
    table = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # as published
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            unet=unet(),
            vae=vae(),
            text_encoder=text_encoder(),
            tokenizer=clip_tokenizer(TOKENS),
            scheduler=DDIMScheduler(**{**table, "steps_offset": 1, "clip_sample": False, **scheduler}),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
    }
    return UNet2DConditionModel(**{**settings, **changes})


def vae() -> AutoencoderKL:
    """Halves the sides."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.18215,
    )


def text_encoder() -> CLIPTextModel:
    tokenizer = clip_tokenizer(TOKENS)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=5.0,  # at 1 the text hardly moves the picture
    )
    return CLIPTextModel(config)


def sd_policy(
    folder: Path,
    *,
    lora: bool = True,
    shake: float = 0.0,
    dtype: torch.dtype = torch.float32,
    train: tuple[str, ...] = ("unet",),
    **rollout: Any,
) -> Policy:
    """A policy on a folder that ``sd_folder`` wrote; ``shake`` moves its weights away from the reference."""
    family = sd.Family.load(sd.Config(), str(folder), dtype, "cpu")
    small = {"size": (16, 16), "num_steps": 4, "micro_batch": 4, "kernel": "ddim"}
    if lora:
        parameters = attach(family.nets, train, LoraConfig(rank=4), family.lora_targets, seed=0)
    else:
        parameters = full(family.nets, train)
    policy = Policy(family, RolloutConfig(**{**small, **rollout}), parameters, lora)
    shaken(policy, shake)
    return policy
