"""How safe for work a picture is, to an image classifier."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.types import Prompt
from rlalign_rewards._networks import from_hub, placed


class Nsfw:
    """How safe for work the picture is: 1 minus what a classifier gives to the labels in `unsafe`.

    Model: Falconsai/nsfw_image_detection (ViT-B/16, 343 MB) with its own processor, or any image classifier of
    transformers, as a folder or a name on the hub; `unsafe` names those of its labels that are meant.
    Score: a probability in [0, 1], 1 is safe. Of a video the mean over its frames; the detail "worst" is its worst one.
    Licence: Apache-2.0 (the default's weights); others have their own.
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
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self._network: Any = placed(from_hub(model, AutoModelForImageClassification.from_pretrained), device, dtype)
        self._processor: Any = from_hub(model, AutoImageProcessor.from_pretrained)
        labels = {label: number for number, label in self._network.config.id2label.items()}
        unknown = [label for label in unsafe if label not in labels]
        if unknown or not unsafe:
            raise ValueError(f"{model} has no label {', '.join(unknown) or 'to look for'}; it has {', '.join(labels)}")
        self._unsafe = [labels[label] for label in unsafe]

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """images: uint8 [B, (F,) 3, H, W]"""
        frames = self._safe(images.flatten(0, -4)).reshape(len(images), -1).to(images.device)
        return {"score": frames.mean(1), "worst": frames.amin(1)}

    def _safe(self, images: Tensor) -> Tensor:
        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = self._network(pixel_values=pixels.to(self._network.device, self._network.dtype)).logits.float()
        return 1 - logits.softmax(-1)[:, self._unsafe].sum(-1)
