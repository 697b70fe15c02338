"""What families share that work on the latents of an image VAE, with whatever scheduler diffusers has for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.models.base import Unusable
from rlalign.types import Prompt, Schedule, Size


def from_scheduler(scheduler: Any) -> Schedule:
    """The table of a scheduler that counts in sigmas and was told how many steps.

    Outside the flow path x is 1/sqrt(1 + sigma^2) of what the scheduler calls it, so that its variance stays 1.
    """
    sigma, times = scheduler.sigmas.double(), scheduler.timesteps.float()
    time = torch.cat([times, times.new_zeros(1)])
    if scheduler.config.get("use_flow_sigmas") or not hasattr(scheduler, "alphas_cumprod"):
        return Schedule((1 - sigma).float(), sigma.float(), time)
    alpha = (1 + sigma.square()).rsqrt()
    return Schedule(alpha.float(), (sigma * alpha).float(), time, scheduler.alphas_cumprod.double().sqrt())


def from_ddim(scheduler: Any) -> Schedule:
    """The same of DDIM's, which counts in training times."""
    table, times = scheduler.alphas_cumprod.double(), scheduler.timesteps
    signal = torch.cat([table[times], scheduler.final_alpha_cumprod.double().reshape(1)])
    time = torch.cat([times, times.new_zeros(1)]).float()
    return Schedule(signal.sqrt().float(), (1 - signal).sqrt().float(), time, table.sqrt())


def image_shape(size: Size, channels: int, factor: int, patch: int = 1) -> tuple[int, ...]:
    """(C, height, width) of latents that stand for ``factor`` pixels a side; ValueError for sides of no whole patch."""
    side = factor * patch
    if size.frames != 1 or size.height % side or size.width % side:
        raise ValueError(f"size {list(size)}: this model makes single images with sides divisible by {side}")
    return channels, size.height // factor, size.width // factor


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, 3, H, W] in [0, 1]."""
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor + _shift(vae)
    pixels: Tensor = vae.decode(scaled, return_dict=False)[0]
    return (pixels / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encoded(vae: Any, pixels: Tensor) -> Tensor:
    """``decoded`` undone: [B, 3, H, W] in [0, 1] -> [B, C, h, w], the mean where the encoder says a distribution."""
    output = vae.encode((2 * pixels - 1).to(vae.device, vae.dtype), return_dict=False)[0]
    mean: Tensor = output if isinstance(output, Tensor) else output.mean
    return (mean - _shift(vae)) * vae.config.scaling_factor


def shown(prompts: Sequence[Prompt]) -> Tensor:
    """[P, 3, H, W] in [0, 1]: the images of the prompts; Unusable where one has none."""
    images = [prompt.image for prompt in prompts if prompt.image is not None]
    if len(images) < len(prompts):
        text = next(prompt.text for prompt in prompts if prompt.image is None)
        raise Unusable(
            f"the prompt {text!r} has no image, which this model starts from; write the prompts as .jsonl, each with "
            '"image", the path of a file'
        )
    return torch.stack(images).float() / 255


def _shift(vae: Any) -> float:
    return vae.config.get("shift_factor") or 0.0
