"""What the families of Qwen-Image share: text behind a mask, packed latents, and guidance that keeps lengths."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rlalign.models.base import classifier_free_guidance
from rlalign.models.flow_match import shifted_schedule
from rlalign.models.images import image_shape
from rlalign.models.video import decode_video, encode_video
from rlalign.types import Cond, Schedule, Size

LORA_TARGETS = (  # as flow_grpo for Qwen-Image-Edit; diffusers' script takes the first four alone
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
)


def padded(embeds: Tensor, mask: Tensor | None, length: int) -> Cond:
    """prompt_embeds [P, length, C] and mask [P, length] of the tokens that are there; mask None: all of embeds."""
    if (missing := length - embeds.shape[1]) < 0:
        raise ValueError(
            f"a prompt with its image takes {embeds.shape[1]} tokens: set model.max_sequence_length to as many or more"
        )
    there = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device) if mask is None else mask.bool()
    return {"prompt_embeds": pad(embeds, (0, 0, 0, missing)), "mask": pad(there, (0, missing))}


def grid(pipeline: Any, size: Size) -> tuple[int, int]:
    """Rows and columns of patches, 2 x 2 latents each."""
    _, height, width = image_shape(size, 0, 2 * pipeline.vae_scale_factor)
    return height, width


def packed_shape(pipeline: Any, size: Size) -> tuple[int, int]:
    """(tokens, C): patch by patch, row by row."""
    height, width = grid(pipeline, size)
    return height * width, pipeline.transformer.config.in_channels


def packed_schedule(pipeline: Any, steps: int, size: Size) -> Schedule:
    """The scheduler's table, shifted for as many tokens as the picture has."""
    return shifted_schedule(pipeline.scheduler.config, steps, packed_shape(pipeline, size)[0])


def velocity(net: nn.Module, x: Tensor, time: Tensor, cond: Cond, grids: list[tuple[int, int]]) -> Tensor:
    """noise - clean [B, tokens, C] of x; cond's reference [B, tokens, C], if any, stands behind x with its own grid."""
    tokens = torch.cat([x, cond["reference"].to(x.dtype)], 1) if "reference" in cond else x
    shapes = [[(1, *one) for one in grids]] * len(x)
    text = cond["prompt_embeds"], cond["mask"]
    return net(tokens, *text, time / 1000, img_shapes=shapes, return_dict=False)[0][:, : x.shape[1]]


def guide(positive: Tensor, negative: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance with the length of every token's conditional prediction, as the pipelines."""
    guided = classifier_free_guidance(positive, negative, scale)
    return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def decode_packed(pipeline: Any, latents: Tensor, size: Size) -> Tensor:
    """[B, tokens, C] -> [B, 3, H, W] in [0, 1]."""
    unpacked = pipeline._unpack_latents(latents, size.height, size.width, pipeline.vae_scale_factor)
    return decode_video(pipeline.vae, unpacked)


def encode_packed(pipeline: Any, pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, tokens, C]: the mean of the VAE's posterior."""
    latents = encode_video(pipeline.vae, pixels)[:, :, 0]
    return pipeline._pack_latents(latents, *latents.shape)
