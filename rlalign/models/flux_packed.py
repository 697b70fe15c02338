"""What the families of FLUX.1 share: two text encoders, latents in packed patches, and the call of the net."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlalign.models.flow_match import shifted_schedule
from rlalign.models.images import decoded, encoded, image_shape
from rlalign.types import Cond, Schedule, Size

PATCH = 2  # latents a side
LORA_TARGETS = (  # as flow_grpo and diffusers' scripts
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
)


def encode_texts(pipeline: Any, texts: Sequence[str], length: int) -> Cond:
    """prompt_embeds [P, T, C] of T5 and pooled [P, C] of CLIP."""
    embeds, pooled, _ = pipeline.encode_prompt([*texts], max_sequence_length=length)
    return {"prompt_embeds": embeds, "pooled": pooled}


def packed_shape(pipeline: Any, size: Size) -> tuple[int, int]:
    """(tokens, C): patches of 2 x 2 latents, row by row."""
    channels, height, width = image_shape(
        size, pipeline.transformer.config.in_channels, PATCH * pipeline.vae_scale_factor
    )
    return height * width, channels


def packed_schedule(pipeline: Any, steps: int, size: Size) -> Schedule:
    """The scheduler's table, shifted for as many tokens as the picture has."""
    return shifted_schedule(pipeline.scheduler.config, steps, packed_shape(pipeline, size)[0])


def velocity(pipeline: Any, net: nn.Module, x: Tensor, time: Tensor, cond: Cond, size: Size, guidance: float) -> Tensor:
    """noise - clean [B, tokens, C] of x; cond's reference [B, tokens, C], if any, stands behind x in time 1."""
    places = _places(pipeline, x, size)
    tokens, reference = x, cond.get("reference")
    if reference is not None:
        beside = places.clone()
        beside[:, 0] = 1
        tokens, places = torch.cat([x, reference.to(x.dtype)], 1), torch.cat([places, beside])
    told = time.new_full((len(x),), guidance) if pipeline.transformer.config.guidance_embeds else None
    embeds = cond["prompt_embeds"]
    texts = x.new_zeros(embeds.shape[1], 3)
    output = net(tokens, embeds, cond["pooled"], time / 1000, places, texts, told, return_dict=False)[0]
    return output[:, : x.shape[1]]


def _places(pipeline: Any, x: Tensor, size: Size) -> Tensor:
    """[tokens, 3]."""
    side = PATCH * pipeline.vae_scale_factor
    return pipeline._prepare_latent_image_ids(len(x), size.height // side, size.width // side, x.device, x.dtype)


def decode_packed(pipeline: Any, latents: Tensor, size: Size) -> Tensor:
    """[B, tokens, C] -> [B, 3, H, W] in [0, 1]."""
    unpacked = pipeline._unpack_latents(latents, size.height, size.width, pipeline.vae_scale_factor)
    return decoded(pipeline.vae, unpacked)


def encode_packed(pipeline: Any, pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, tokens, C]: the mean of the VAE's posterior."""
    latents = encoded(pipeline.vae, pixels)
    return pipeline._pack_latents(latents, *latents.shape)
