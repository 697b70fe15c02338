"""What pictures are compared by: features of a network that lies on this machine. Nothing is ever downloaded.

PATH.safetensors    the Inception network of FID (inception.py)
PATH/               a folder of transformers: a CLIP, for its image embedding, or a DINOv2, for its class token
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlalign.evaluation.inception import FidInception

BATCH = 16
KINDS = ("clip", "clip_vision_model", "dinov2")


class Features(Protocol):
    """uint8 pictures [B, 3, H, W] of one size -> [B, D]."""

    def __call__(self, pictures: Tensor) -> Tensor: ...


def read_network(path: Path, device: torch.device) -> Features:
    """ValueError, one sentence, where there is none that is known."""
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ValueError(f"--features: there is no file {path}")
        return FidInception.read(path).to(device)
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(
            f"--features {path} is no network: name the safetensors file of FID's Inception, or the folder of a CLIP "
            "or DINOv2 model of transformers"
        )
    try:
        told = json.loads(config.read_bytes())
    except ValueError:
        raise ValueError(f"--features: {config} is not JSON") from None
    kind = told.get("model_type") if isinstance(told, dict) else None
    if kind not in KINDS:
        raise ValueError(f"--features {path} holds a model of type {kind!r}; it can be {' or '.join(KINDS)}")
    return _Transformer(path, kind, device)


class _Transformer:
    def __init__(self, path: Path, kind: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, CLIPModel, CLIPVisionModelWithProjection, Dinov2Model

        known = {"clip": CLIPModel, "clip_vision_model": CLIPVisionModelWithProjection, "dinov2": Dinov2Model}
        local = {"local_files_only": True}
        try:
            self.network: Any = known[kind].from_pretrained(str(path), use_safetensors=True, **local).to(device).eval()
            self.processor: Any = AutoImageProcessor.from_pretrained(str(path), **local)
        except (OSError, ValueError) as error:
            raise ValueError(f"--features {path} cannot be read: {' '.join(str(error).split())}") from error
        self.kind = kind

    def __call__(self, pictures: Tensor) -> Tensor:
        prepared = self.processor(images=list(pictures), return_tensors="pt", input_data_format="channels_first")
        pixels = prepared["pixel_values"].to(self.network.device)
        if self.kind == "dinov2":
            return self.network(pixels).pooler_output
        return self.network.visual_projection(self.network.vision_model(pixel_values=pixels).pooler_output)


@torch.no_grad()
def features_of(network: Features, pictures: Iterable[Tensor]) -> Tensor:
    """[N, D] float32 on the CPU, of pictures [3, H, W] uint8 of whatever sizes, in their order."""
    found: list[Tensor] = []
    batch: list[Tensor] = []
    for picture in pictures:
        if batch and (len(batch) == BATCH or picture.shape != batch[0].shape):
            found.append(_asked(network, batch))
            batch = []
        batch.append(picture)
    if batch:
        found.append(_asked(network, batch))
    if not found:
        raise ValueError("there are no pictures to compare")
    return torch.cat(found)


def _asked(network: Features, batch: Sequence[Tensor]) -> Tensor:
    return network(torch.stack([*batch])).float().cpu()
