"""Qwen-Image-Edit (arXiv 2508.02324) and its Plus (2509, 2511) through diffusers: an image out of a text and an image.

The net sees the prompt's image twice, through the language model and as latents, in the sizes that the pipelines give
it. Tried with tiny random weights only, against diffusers' own pipelines; never with the published ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import DiffusionPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
from PIL.Image import Image
from pydantic import Field
from torch import Tensor, nn

from rlalign.models import qwen_packed
from rlalign.models.base import PredictionType
from rlalign.models.flow_match import load_pipeline
from rlalign.models.images import shown
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """What a run file may say about this family."""

    max_sequence_length: int = Field(default=2048, ge=1, le=4096)
    """Tokens of a text and the image in it, to which every prompt is padded; an image of 1024 x 1024 takes 1369."""
    reference_area: int = Field(default=1024 * 1024, ge=32 * 32)
    """Pixels of the image whose latents the net sees, about; as the pipelines. Fewer are faster."""
    text_area: int = Field(default=384 * 384, ge=32 * 32)
    """Pixels of the image that Plus shows its language model, which are 196 tokens; before Plus reference_area."""


@final
class Family:
    """One pipeline folder or Hub id. Everything is frozen and in evaluation mode until a policy says what trains."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = qwen_packed.LORA_TARGETS
    guide = staticmethod(qwen_packed.guide)

    def __init__(self, config: Config, pipeline: QwenImageEditPipeline | QwenImageEditPlusPipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        plus = isinstance(pipeline, QwenImageEditPlusPipeline)
        self.text_area = config.text_area if plus else config.reference_area
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets: dict[str, nn.Module] = {"transformer": pipeline.transformer}

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        pipeline = load_pipeline(DiffusionPipeline, path, dtype)
        if not isinstance(pipeline, QwenImageEditPipeline | QwenImageEditPlusPipeline):
            raise ValueError(f"{path!r} holds a {type(pipeline).__name__}, which is no pipeline of Qwen-Image-Edit")
        return Family(config, pipeline.to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C], mask [P, T], both of text and image, and reference [P, tokens, C], its latents."""
        pixels, processor = shown(prompts), self.pipeline.image_processor
        ratio, area = pixels.shape[-1] / pixels.shape[-2], self.config.reference_area
        pictures = processor.numpy_to_pil(processor.pt_to_numpy(pixels))
        latents = qwen_packed.encode_packed(
            self.pipeline, processor.preprocess(pictures, *_sides(area, ratio)) / 2 + 0.5
        )
        reference = {"reference": latents.to(self.pipeline.text_encoder.dtype)}
        fitted = [processor.resize(picture, *_sides(self.text_area, ratio)) for picture in pictures]
        texts, negatives = [prompt.text for prompt in prompts], [prompt.negative or " " for prompt in prompts]
        return self._encode(texts, fitted) | reference, self._encode(negatives, fitted) | reference

    def _encode(self, texts: list[str], pictures: list[Image]) -> Cond:
        """One by one: several images in a call would all go with every text."""
        length, alone = self.config.max_sequence_length, list[Cond]()
        for text, picture in zip(texts, pictures, strict=True):
            embeds, mask = self.pipeline.encode_prompt(text, [picture])
            alone.append(qwen_packed.padded(embeds, mask, length))
        return {name: torch.cat([one[name] for one in alone]) for name in alone[0]}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(tokens, C): patches of 2 x 2 latents, row by row."""
        return qwen_packed.packed_shape(self.pipeline, size)

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The scheduler's table, shifted for as many tokens as the picture has."""
        return qwen_packed.packed_schedule(self.pipeline, steps, size)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity noise - clean [B, tokens, C]."""
        reference = Size(*_sides(self.config.reference_area, size.width / size.height))
        grids = [qwen_packed.grid(self.pipeline, one) for one in (size, reference)]
        return qwen_packed.velocity(self.nets["transformer"], x, time, cond, grids)

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, tokens, C] -> [B, 3, H, W] in [0, 1]."""
        return qwen_packed.decode_packed(self.pipeline, latents, size)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, tokens, C]: the mean of the VAE's posterior."""
        return qwen_packed.encode_packed(self.pipeline, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        type(self.pipeline)(**{**self.pipeline.components, **merged(self.nets)}).save_pretrained(folder)


def _sides(area: int, ratio: float) -> tuple[int, int]:
    """Height and width, multiples of 32, for that width / height."""
    width, height, _ = calculate_dimensions(area, ratio)
    return height, width
