"""Pictures as a grid shows them, made small where they are: whole ones of large models would be gigabytes."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

LONGEST = 256  # pixels of a side


def shown(images: Tensor) -> Tensor:
    """uint8 [B, (F,) 3, H, W] -> [B, 3, h, w]: of videos the middle frame, of big pictures their averages."""
    images = images[:, images.shape[1] // 2] if images.ndim == 5 else images
    long = max(images.shape[-2:])
    if long <= LONGEST:
        return images
    size = [max(1, round(side * LONGEST / long)) for side in images.shape[-2:]]
    return interpolate(images.float(), size, mode="area").round().to(torch.uint8)
