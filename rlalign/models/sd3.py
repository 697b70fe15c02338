"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206) through diffusers: a rectified-flow transformer on image latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from pydantic import Field
from torch import Tensor, nn

from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.images import decoded, encoded
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """What a run file may say about this family."""

    text_encoder_3: bool = True
    """Load T5. False saves 9 GB of memory with the published weights, and is needed for folders without it."""
    max_sequence_length: int = Field(default=256, ge=0, le=512)
    """Text tokens of T5; without T5 they are zeros, as in diffusers. 0 leaves them out."""


@final
class Family:
    """One pipeline folder or Hub id. Everything is frozen and in evaluation mode until a policy says what trains."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = (  # as flow_grpo
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, pipeline: StableDiffusion3Pipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        clips = {name: part for name in ("text_encoder", "text_encoder_2") if (part := pipeline.components[name])}
        self.nets: dict[str, nn.Module] = {"transformer": pipeline.transformer, **clips}  # diffusers adapts no T5
        self.patch = pipeline.vae_scale_factor * pipeline.patch_size  # pixels

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        """The VAE stays in float32: its half-precision decoding is not worth the memory."""
        without = {} if config.text_encoder_3 else {"text_encoder_3": None, "tokenizer_3": None}
        dtypes = {"vae": torch.float32, "default": dtype}
        try:
            pipeline = StableDiffusion3Pipeline.from_pretrained(path, dtype=dtypes, **without)
        except (OSError, ValueError) as error:  # no such folder or id; parts missing
            hint = "; if it has no T5, set model.text_encoder_3 to false" if config.text_encoder_3 else ""
            raise ValueError(f"no Stable Diffusion 3 pipeline could be loaded from {path!r}{hint}: {error}") from error
        if pipeline.text_encoder_3 is not None and config.max_sequence_length == 0:
            raise ValueError("model.max_sequence_length 0 leaves T5 without tokens: set model.text_encoder_3 to false")
        return Family(config, pipeline.to(device))

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C] and pooled [P, C], of the prompts and of what they are guided away from."""
        texts = [prompt.text for prompt in prompts]
        embeds, uncond_embeds, pooled, uncond_pooled = self.pipeline.encode_prompt(
            *(texts, texts, texts),
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled": pooled}, {"prompt_embeds": uncond_embeds, "pooled": uncond_pooled}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(C, height, width); the sides are whole patches, and not more than the net has positions for."""
        most = self.patch * self.pipeline.transformer.config.pos_embed_max_size
        if size.frames != 1 or size.height % self.patch or size.width % self.patch or max(size[:2]) > most:
            raise ValueError(
                f"size {list(size)}: this model makes single images with sides divisible by {self.patch}, up to {most}"
            )
        factor = self.pipeline.vae_scale_factor
        return self.pipeline.transformer.config.in_channels, size.height // factor, size.width // factor

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The scheduler's table; with dynamic shifting, for as many image tokens as the pipeline counts."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        settings, tokens = scheduler.config, (size.height // self.patch) * (size.width // self.patch)
        mu = calculate_shift(
            *(tokens, settings.base_image_seq_len, settings.max_image_seq_len, settings.base_shift, settings.max_shift)
        )
        scheduler.set_timesteps(steps, mu=mu if settings.use_dynamic_shifting else None)
        time = torch.cat([scheduler.timesteps, scheduler.timesteps.new_zeros(1)])
        return Schedule(1 - scheduler.sigmas, scheduler.sigmas, time)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity noise - clean [B, C, h, w]."""
        return self.nets["transformer"](x, cond["prompt_embeds"], cond["pooled"], time, return_dict=False)[0]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]."""
        return decoded(self.pipeline.vae, latents)

    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w]: the mean of the VAE's posterior."""
        return encoded(self.pipeline.vae, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        StableDiffusion3Pipeline(**{**self.pipeline.components, **merged(self.nets)}).save_pretrained(folder)
