"""CLIP for rewards, from transformers or from open_clip, differentiable in the pictures.

Texts are encoded without a graph and each one once, however many pictures it has.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlalign.types import Prompt
from rlalign_rewards._networks import (
    CLIP_MEAN,
    CLIP_STD,
    cropped,
    fill,
    from_hub,
    normalised,
    padded,
    placed,
    state_dict,
    unit,
)

_Prepare = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Clip:
    """The two encoders and what the pictures have to look like."""

    see: Callable[[Tensor], Tensor]  # normalised pictures [B, 3, size, size] -> [B, D]
    read: Callable[[list[str]], Tensor]  # -> [B, D]
    logit_scale: Tensor  # []  a logarithm
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    prepare: _Prepare = cropped

    def images(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, D], with a graph where the pictures have one. images: float [B, 3, H, W] in [0, 1]"""
        images = images.to(self.logit_scale.device, torch.float32)
        pixels = normalised(self.prepare(images, self.size), self.mean, self.std)
        return unit(self.see(pixels.to(self.logit_scale.dtype)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings [B, D]."""
        distinct = list(dict.fromkeys(texts))
        with torch.no_grad():
            embedded = unit(self.read(distinct))
        return embedded[[distinct.index(text) for text in texts]]

    def cosines(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Of every picture with its own prompt, in [-1, 1]. [B]"""
        return (self.images(images) * self.texts([prompt.text for prompt in prompts])).sum(-1)


def transformers_clip(model: str, processor: str, device: str | None, dtype: str) -> Clip:
    """A CLIPModel and, by a name of its own, its tokenizer and picture size; folders or names on the hub."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

    network: Any = placed(from_hub(model, CLIPModel.from_pretrained), device, dtype)
    tokenizer: Any = from_hub(processor, CLIPTokenizerFast.from_pretrained)
    pictures: Any = from_hub(processor, CLIPImageProcessor.from_pretrained)
    longest = network.config.text_config.max_position_embeddings

    def see(pixels: Tensor) -> Tensor:
        return network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)

    def read(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        return network.text_projection(network.text_model(**tokens.to(network.device)).pooler_output)

    return Clip(
        see=see,
        read=read,
        logit_scale=network.logit_scale,
        size=network.config.vision_config.image_size,
        mean=pictures.image_mean,
        std=pictures.image_std,
    )


def open_clip(architecture: str, pretrained: str, device: str | None, dtype: str) -> Clip:
    """A network of open_clip with the weights of a file or of one of its tags, cropped pictures."""
    import open_clip as library

    _check_architecture(architecture)

    def load(source: str) -> Any:
        return library.create_model(architecture, pretrained=source, require_pretrained=True)

    fetch = f"open_clip.create_model('{architecture}', '{pretrained}')"
    network = placed(from_hub(pretrained, load, fetch), device, dtype)
    return _of_open_clip(network, architecture, cropped, network.visual.image_mean, network.visual.image_std)


def open_clip_checkpoint(architecture: str, checkpoint: Path, device: str | None, dtype: str) -> Clip:
    """A network of open_clip that somebody trained further, every tensor of it in the file; padded pictures."""
    import open_clip as library

    _check_architecture(architecture)
    state = state_dict(checkpoint)  # before the network, which takes gigabytes
    network = library.CLIP(**library.get_model_config(architecture))
    fill(network, state, checkpoint)
    return _of_open_clip(placed(network, device, dtype), architecture, padded, CLIP_MEAN, CLIP_STD)


def _check_architecture(name: str) -> None:
    import open_clip as library

    if name not in library.list_models():
        raise ValueError(f"open_clip has no architecture {name!r}; `open_clip.list_models()` names them")


def _of_open_clip(
    network: Any, architecture: str, prepare: _Prepare, mean: Sequence[float], std: Sequence[float]
) -> Clip:
    import open_clip as library

    tokenizer: Any = library.get_tokenizer(architecture)
    size = network.visual.image_size
    return Clip(
        see=network.encode_image,
        read=lambda texts: network.encode_text(tokenizer(texts).to(network.logit_scale.device)),
        logit_scale=network.logit_scale,
        size=size[0] if isinstance(size, tuple) else size,
        mean=mean,
        std=std,
        prepare=prepare,
    )
