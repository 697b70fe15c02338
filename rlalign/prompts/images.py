"""Images and videos that prompts start from: read from files, stood in for, told apart by their content."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rlalign.types import Prompt, Size


def read_image(path: str | Path, size: Size) -> Tensor:
    """[3, H, W] uint8, RGB, upright: scaled until it covers the size, its sides kept in proportion, the middle cut out.

    ValueError with the path when there is no such file or it is no image.
    """
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's own for what is damaged or huge
        raise ValueError(f"{path} cannot be read as an image: {error}") from OSError(str(error))
    fitted = ImageOps.fit(upright, (size.width, size.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def stand_in(text: str, size: Size) -> Prompt:
    """With a grey image, and frames for a model of videos, so that every family can encode it."""
    grey = torch.full((size.frames, 3, size.height, size.width), 128, dtype=torch.uint8)
    return Prompt(text, image=grey[0], video=grey if size.frames > 1 else None)


def seen_by_model(prompt: Prompt) -> tuple[str, ...]:
    """A key of all that a model makes a sample from, images by their content; metadata is for rewards."""
    return prompt.text, repr(prompt.negative), _content(prompt.image), _content(prompt.video)


def _content(pixels: Tensor | None) -> str:
    if pixels is None:
        return ""
    return f"{list(pixels.shape)} {hashlib.sha256(pixels.cpu().contiguous().numpy().tobytes()).hexdigest()}"
