"""Wan 2.1 and 2.2 (arXiv 2503.20314), text to video, through diffusers: one flow transformer, or two experts.

Guidance has one scale for both experts. Tried with tiny random weights only, against diffusers' own pipeline; never
with the published ones. There the deterministic rollout was the pipeline's with FlowMatchEulerDiscreteScheduler, and
with UniPC of order 1 without corrector; the published pipelines have UniPC of order 2, and a run takes only its levels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import WanPipeline
from pydantic import Field
from torch import Tensor, nn

from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.flow_match import load_pipeline
from rlalign.models.lora import freeze, merged
from rlalign.models.video import by_expert, decode_video, encode_video, experts, latent_axes, own_schedule
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """What a run file may say about this family."""

    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """Text tokens, to which every prompt is padded."""


@final
class Family:
    """One pipeline folder or Hub id. Everything is frozen and in evaluation mode until a policy says what trains.

    Of Wan 2.2 the net ``transformer`` has the noisy steps and ``transformer_2`` the others; the first trains unless
    model.train says otherwise. ``load_lora_weights`` reads the first one's adapters alone; the other's are for
    ``pipeline.transformer_2.load_lora_adapter(folder, prefix="transformer_2", use_safetensors=True)``.
    """

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # of both attentions, as flow_grpo
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, pipeline: WanPipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets, self.boundary = experts(pipeline)
        self.dtype = pipeline.transformer.dtype  # of most weights: some stay in float32

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        return Family(config, load_pipeline(WanPipeline, path, dtype).to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C], zeros behind the text, of the prompts and of what they are guided away from."""
        embeds, uncond_embeds = self.pipeline.encode_prompt(
            [prompt.text for prompt in prompts],
            [prompt.negative or "" for prompt in prompts],
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"prompt_embeds": embeds}, {"prompt_embeds": uncond_embeds}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(C, frames, height, width)."""
        net, vae = self.pipeline.transformer.config, self.pipeline.vae.config
        axes = latent_axes(size, vae.scale_factor_spatial, vae.scale_factor_temporal, net.patch_size[-1])
        return net.in_channels, *axes

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The scheduler's table."""
        return own_schedule(self.pipeline.scheduler, steps)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity noise - clean [B, C, F, h, w]."""
        inputs = (x.to(self.dtype), time, cond["prompt_embeds"].to(self.dtype))
        return by_expert(self.nets, self.boundary, time, lambda net: net(*inputs, return_dict=False)[0])

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, C, f, h, w] -> [B, F, 3, H, W] in [0, 1], of a single frame [B, 3, H, W]."""
        return decode_video(self.pipeline.vae, latents)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, (F,) 3, H, W] in [0, 1] -> [B, C, f, h, w]."""
        return encode_video(self.pipeline.vae, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        settings = {key: self.pipeline.config[key] for key in ("boundary_ratio", "expand_timesteps")}
        WanPipeline(**{**self.pipeline.components, **merged(self.nets), **settings}).save_pretrained(folder)
