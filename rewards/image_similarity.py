"""How much an edited picture still resembles the one it was made from."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.scoring import differentiable
from rlalign.types import Prompt
from rlalign_rewards._clip import transformers_clip
from rlalign_rewards._networks import cropped, from_hub, normalised, over_frames, placed, resized, unit

_BILINEAR = 2  # Pillow's number


@differentiable
class ImageSimilarity:
    """How much the picture resembles the one it was made from, the prompt's image, for editing; differentiable.

    Model: facebook/dinov2-base (346 MB), the first token of its last layer; any ViT of transformers (DINO, DINOv2) or a
    CLIP, whose image embedding is taken, as a folder or a name on the hub. DINO looks at form and identity, CLIP at
    what is shown; papers on editing report them as DINO-I and CLIP-I.
    Score: the cosine of the two embeddings, in [-1, 1], 1 for the unchanged picture. Of a video the mean over its
    frames, each against the image.
    Licence: DINOv2 Apache-2.0, CLIP MIT.
    Known hacks: changing nothing is best. Use it beside a reward for the edit, or as a monitor.
    Options: model, device (a GPU where there is one), dtype (float32, bfloat16, float16).
    """

    def __init__(self, model: str = "facebook/dinov2-base", device: str | None = None, dtype: str = "float32") -> None:
        from transformers import AutoConfig

        kind = from_hub(model, AutoConfig.from_pretrained).model_type
        clip = kind == "clip"
        self._embed = transformers_clip(model, model, device, dtype).images if clip else _dino(model, device, dtype)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[B]. images: float [B, (F,) 3, H, W] in [0, 1]"""
        with torch.no_grad():
            origins = torch.cat([self._embed(origin(prompt)[None] / 255) for prompt in prompts])  # [B, D]
        frames = len(images.flatten(0, -4)) // len(images)
        repeated = origins.repeat_interleave(frames, 0)
        return over_frames(lambda pictures, _: (self._embed(pictures) * repeated).sum(-1), images, prompts)


def origin(prompt: Prompt) -> Tensor:
    """What the sample was made from. uint8 [3, H, W]"""
    if prompt.image is None:
        raise ValueError(f"image_similarity compares with the image of a prompt, and {prompt.text!r} has none")
    return prompt.image


def _dino(model: str, device: str | None, dtype: str) -> Callable[[Tensor], Tensor]:
    from transformers import AutoImageProcessor, AutoModel

    network: Any = placed(from_hub(model, AutoModel.from_pretrained), device, dtype)
    processor: Any = from_hub(model, AutoImageProcessor.from_pretrained)
    mode = "bilinear" if processor.resample == _BILINEAR else "bicubic"

    def prepare(images: Tensor) -> Tensor:
        if processor.do_center_crop:
            return cropped(images, processor.crop_size["height"], processor.size["shortest_edge"], mode)
        return resized(images, processor.size["height"], processor.size["width"], mode)

    def embed(images: Tensor) -> Tensor:
        pixels = normalised(
            prepare(images.to(network.device, torch.float32)), processor.image_mean, processor.image_std
        )
        return unit(network(pixel_values=pixels.to(network.dtype)).last_hidden_state[:, 0])

    return embed
