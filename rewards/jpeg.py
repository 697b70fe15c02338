"""How large is the picture as a JPEG? The reward of DDPO (https://arxiv.org/abs/2305.13301) that needs no network.

The number is kilobytes (1000 bytes), so it depends on the quality (95 in the paper) and grows with the resolution: at
32 x 32 about 620 bytes are header, which no picture is without. Only compare runs of one quality and one size.
"""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from rlalign.types import Prompt


def jpeg_compressibility(images: Tensor, prompts: Sequence[Prompt], quality: int = 95) -> Tensor:
    """Minus the size in kB: smooth pictures score high. images: uint8 [B, (F,) 3, H, W]

    Score: kilobytes of 1000 bytes at `quality`, negative; at 32 x 32 about -0.6 is the best there is. It grows with the
    resolution: compare runs of one size and one quality.
    Known hacks: it is nothing but a hack: blank pictures win. For trying algorithms.
    Options: quality.
    """
    return -jpeg_incompressibility(images, prompts, quality)


def jpeg_incompressibility(images: Tensor, prompts: Sequence[Prompt], quality: int = 95) -> Tensor:
    """The size in kB, of a video the mean over its frames: noise scores high. images: uint8 [B, (F,) 3, H, W]

    Score: kilobytes of 1000 bytes at `quality`. It grows with the resolution: compare runs of one size and one quality.
    Known hacks: it is nothing but a hack: noise wins. For trying algorithms.
    Options: quality.
    """
    frames = images.flatten(0, -4)  # [B (* F), 3, H, W]
    sizes = [_kilobytes(frame, quality) for frame in frames]
    return torch.tensor(sizes).reshape(len(images), -1).mean(1)


def _kilobytes(picture: Tensor, quality: int) -> float:
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=quality)
    return file.tell() / 1000
