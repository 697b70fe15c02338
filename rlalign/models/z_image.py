"""Z-Image (arXiv 2511.22699) through diffusers: a single-stream flow transformer, text of any length beside the image.

`rollout.guidance_scale` is 1 more than the pipeline's: 1 is no guidance, which Turbo was distilled for. Tried with tiny
random weights only, against diffusers' own pipeline; never with the published ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.flow_match import load_pipeline, shifted_schedule
from rlalign.models.images import decoded, encoded, image_shape
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size

PATCH = 2  # latents a side


class Config(Settings):
    """What a run file may say about this family."""

    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """Most tokens of a text; longer ones are cut. As the pipeline's call."""


@final
class Family:
    """One pipeline folder or Hub id. Everything is frozen and in evaluation mode until a policy says what trains."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # as diffusers' script
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, pipeline: ZImagePipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets: dict[str, nn.Module] = {"transformer": pipeline.transformer}

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        return Family(config, load_pipeline(ZImagePipeline, path, dtype).to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C], and mask [P, T] of the tokens that are there: the net pads a text by a token."""
        length = self.config.max_sequence_length
        found, negatives = self.pipeline.encode_prompt(
            [prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            max_sequence_length=length,
        )
        return _padded(found, length), _padded(negatives, length)

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return image_shape(size, self.pipeline.transformer.config.in_channels, self.pipeline.vae_scale_factor, PATCH)

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The scheduler's table, shifted for as many tokens as the picture has."""
        _, height, width = self.latent_shape(size)
        tokens = (height // PATCH) * (width // PATCH)
        levels = get_default_z_image_sigmas(steps)
        return shifted_schedule(self.pipeline.scheduler.config, steps, tokens, sigmas=levels)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity noise - clean [B, C, h, w]; the net counts time from the noise and predicts its opposite."""
        texts = [embeds[mask] for embeds, mask in zip(cond["prompt_embeds"], cond["mask"], strict=True)]
        output = self.nets["transformer"]([*x[:, :, None]], (1000 - time) / 1000, texts, return_dict=False)[0]
        return -torch.stack(output)[:, :, 0]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]."""
        return decoded(self.pipeline.vae, latents)

    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w]: the mean of the VAE's posterior."""
        return encoded(self.pipeline.vae, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        ZImagePipeline(**{**self.pipeline.components, **merged(self.nets)}).save_pretrained(folder)


def _padded(texts: Sequence[Tensor], length: int) -> Cond:
    """Each [T, C]."""
    embeds = [pad(text, (0, 0, 0, length - len(text))) for text in texts]
    counts = torch.tensor([len(text) for text in texts], device=embeds[0].device)
    return {
        "prompt_embeds": torch.stack(embeds),
        "mask": torch.arange(length, device=counts.device) < counts[:, None],
    }
