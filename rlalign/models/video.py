"""What the families of films share, most of it Wan's; Qwen-Image decodes its single frame by the same VAE."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlalign.models.images import from_scheduler
from rlalign.types import Schedule, Size


def latent_axes(size: Size, space: int, time: int, patch: int) -> tuple[int, int, int]:
    """Latent frames, height and width; ValueError for a size of which the VAE or the net would leave something over.

    A latent is ``space`` pixels a side and ``time`` frames, but for the first frame, which has one of its own.
    """
    side = space * patch
    if (size.frames - 1) % time or size.height % side or size.width % side:
        raise ValueError(
            f"size {list(size)}: this model makes films with sides divisible by {side}, and frames one more than a "
            f"multiple of {time}"
        )
    return (size.frames - 1) // time + 1, size.height // space, size.width // space


def own_schedule(scheduler: Any, steps: int) -> Schedule:
    """The levels and times of the pipeline's own scheduler: its shift decides, and UniPC's times are integers.

    UniPC begins a millionth below 1, lest it take the logarithm of 0. Here that is 1 itself, for which Flow-SDE has a
    rule: so close to it the noise would be a thousand times too large.
    """
    if not scheduler.config.get("use_flow_sigmas", True):
        raise ValueError("this model's scheduler has no flow levels: set use_flow_sigmas in its configuration")
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(steps)
    fresh.sigmas = torch.where(fresh.sigmas > 1 - 1e-5, 1.0, fresh.sigmas)
    return from_scheduler(fresh)


def experts(pipeline: Any) -> tuple[dict[str, nn.Module], float | None]:
    """A Wan pipeline's nets and the time from which the first has the steps; None: it is the only one."""
    if pipeline.transformer_2 is None:
        return {"transformer": pipeline.transformer}, None
    boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
    return {"transformer": pipeline.transformer, "transformer_2": pipeline.transformer_2}, boundary


def by_expert(
    nets: Mapping[str, nn.Module], boundary: float | None, time: Tensor, run: Callable[[nn.Module], Tensor]
) -> Tensor:
    """[B, C, F, h, w]: each row from the net for its time [B]; transformer_2 has those below the boundary.

    A net that some row needs runs on all rows: in a batch of another size a row would have other bits.
    """
    first = torch.ones_like(time, dtype=torch.bool) if boundary is None else time >= boundary  # [B]
    if first.all():
        return run(nets["transformer"])
    if not first.any():
        return run(nets["transformer_2"])
    return torch.where(first.reshape(-1, 1, 1, 1, 1), run(nets["transformer"]), run(nets["transformer_2"]))


def decode_video(vae: Any, latents: Tensor) -> Tensor:
    """[B, C, f, h, w] -> [B, F, 3, H, W] in [0, 1], of a single frame [B, 3, H, W]."""
    mean, std = _channels(vae)
    video = vae.decode(latents.to(vae.dtype) * std + mean, return_dict=False)[0]  # [B, 3, F, H, W]
    return (video / 2 + 0.5).clamp(0, 1).transpose(1, 2).squeeze(1)


def encode_video(vae: Any, pixels: Tensor) -> Tensor:
    """[B, (F,) 3, H, W] in [0, 1] -> [B, C, f, h, w]: the mean of the VAE's posterior."""
    mean, std = _channels(vae)
    video = (pixels if pixels.ndim == 5 else pixels[:, None]).transpose(1, 2)  # [B, 3, F, H, W]
    return (vae.encode((2 * video - 1).to(vae.device, vae.dtype)).latent_dist.mean - mean) / std


def _channels(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents' channels, [1, C, 1, 1, 1] each."""
    table = torch.tensor([vae.config.latents_mean, vae.config.latents_std], dtype=vae.dtype, device=vae.device)
    mean, std = table.reshape(2, 1, -1, 1, 1, 1)
    return mean, std
