"""A random Stable Diffusion 3 pipeline, small enough to be built and run in a test.

folder = sd3_folder(tmp_path / "sd3")            # an ordinary diffusers folder: 16x16 pixels, latents [4, 8, 8]
    policy = sd3_policy(folder, guidance_scale=4.5)  # with LoRA
"""

from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from rlalign.models import sd3
from rlalign.models.lora import LoraConfig, attach, full
from rlalign.policy import Policy, RolloutConfig

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WIDTHS = (16, 8)  # of the two CLIPs


def sd3_folder(
    folder: Path,
    *,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 8,
    channels: int = 4,
    latent_side: int = 8,
    tokens: int = 8,
    t5: bool = False,
    scheduler: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Writes the pipeline in float32 and returns its folder; the same seed gives the same weights.

    One latent is 2x2 pixels, one patch 2x2 latents. ``tokens`` is the length of CLIP's text; ``scheduler`` holds
    settings of FlowMatchEulerDiscreteScheduler, shift = 3 by default.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_3 = t5_encoder(sum(_WIDTHS)) if t5 else None
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer(layers, heads, head_dim, channels, latent_side),
            vae=vae(channels),
            text_encoder=clip(_WIDTHS[0], tokens),
            tokenizer=clip_tokenizer(tokens),
            text_encoder_2=clip(_WIDTHS[1], tokens),
            tokenizer_2=clip_tokenizer(tokens),
            text_encoder_3=text_3,
            tokenizer_3=t5_tokenizer() if t5 else None,
            scheduler=FlowMatchEulerDiscreteScheduler(**(scheduler or {"shift": 3.0})),
        )
    pipeline.save_pretrained(folder)
    return folder


def transformer(layers: int, heads: int, head_dim: int, channels: int, latent_side: int) -> SD3Transformer2DModel:
    """Latents [B, channels, side, side]; positions for twice the side."""
    return SD3Transformer2DModel(
        sample_size=latent_side,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=sum(_WIDTHS),
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=sum(_WIDTHS),
        pos_embed_max_size=latent_side,
    )


def vae(channels: int) -> AutoencoderKL:
    """Halves the sides; scaling and shift as in SD3, so that a test sees both."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def clip(width: int, tokens: int) -> CLIPTextModelWithProjection:
    """Two layers; the pipeline reads the first one's output."""
    tokenizer = clip_tokenizer(tokens)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=5.0,  # at 1 the text hardly moves the picture
    )
    return CLIPTextModelWithProjection(config)


def clip_tokenizer(tokens: int) -> CLIPTokenizer:
    """Spells letter by letter, as far as ``tokens`` reach."""
    symbols = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), _START, _END]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=tokens)


def t5_tokenizer() -> T5Tokenizer:
    """Letters again."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -2.0) for letter in "▁" + ascii_lowercase)], extra_ids=0)


def t5_encoder(width: int) -> T5EncoderModel:
    """One layer."""
    return T5EncoderModel(T5Config(vocab_size=32, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def sd3_policy(
    folder: Path,
    *,
    rank: int = 4,
    lora: bool = True,
    shake: float = 0.0,
    dtype: torch.dtype = torch.float32,
    **rollout: Any,
) -> Policy:
    """A policy on a folder that ``sd3_folder`` wrote; ``shake`` moves its weights away from the reference."""
    config = sd3.Config(text_encoder_3=False, max_sequence_length=0)
    family = sd3.Family.load(config, str(folder), dtype, "cpu")
    settings = RolloutConfig(**{"size": (16, 16), "num_steps": 4, "micro_batch": 4, **rollout})
    if lora:
        parameters = attach(family.nets, ["transformer"], LoraConfig(rank=rank), family.lora_targets, seed=0)
    else:
        parameters = full(family.nets, ["transformer"])
    policy = Policy(family, settings, parameters, lora)
    shaken(policy, shake)
    return policy


@torch.no_grad()
def shaken(policy: Policy, scale: float) -> None:
    """Adds normal numbers to the weights that train."""
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters.values():
        parameter += scale * torch.randn(parameter.shape, generator=generator)
