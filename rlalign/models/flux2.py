"""FLUX.2 through diffusers, dev (Mistral's text, told its guidance) and klein (Qwen's text, true guidance).

A prompt's image, fitted into the size of the sample, is a reference: its tokens stand beside those of the sample. In a
run all prompts have one or none has. Tried with tiny random weights only, against diffusers' own pipelines; never with
the published ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from pydantic import Field
from torch import Tensor, nn

from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.flow_match import load_pipeline, shifted_schedule
from rlalign.models.images import image_shape, shown
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """What a run file may say about this family."""

    guidance: float = Field(default=4.0, ge=0)
    """What dev's net is told as its guidance scale, at no cost; it has no other guidance. Klein is told none, and where
    it is not distilled guided by `rollout.guidance_scale`."""
    max_sequence_length: int = Field(default=512, ge=1, le=512)
    """Text tokens, to which every prompt is padded; as the pipelines' call."""
    text_layers: tuple[int, ...] | None = None
    """Layers of the text encoder whose outputs are taken together; null: the pipeline's own."""


@final
class Family:
    """One pipeline folder or Hub id. Everything is frozen and in evaluation mode until a policy says what trains."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = (  # as diffusers' scripts, for up to dev's 48 blocks
        *("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"),
        *(f"single_transformer_blocks.{block}.attn.to_out" for block in range(48)),
    )
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, pipeline: Flux2Pipeline | Flux2KleinPipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets: dict[str, nn.Module] = {"transformer": pipeline.transformer}
        self.told: bool = pipeline.transformer.config.guidance_embeds

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        pipeline = load_pipeline(DiffusionPipeline, path, dtype)
        if not isinstance(pipeline, Flux2Pipeline | Flux2KleinPipeline):
            raise ValueError(f"{path!r} holds a {type(pipeline).__name__}, which is no pipeline of FLUX.2")
        return Family(config, pipeline.to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, T, C] and, where there are images, reference [P, C, h, w]. Dev has no negative prompt."""
        cond = self._encode([prompt.text for prompt in prompts])
        uncond = None if self.told else self._encode([prompt.negative or "" for prompt in prompts])
        if all(prompt.image is None for prompt in prompts):
            return cond, uncond
        pixels = shown(prompts)
        reference = self.encode_images(pixels, Size(*pixels.shape[2:])).to(self.pipeline.transformer.dtype)
        return cond | {"reference": reference}, None if uncond is None else uncond | {"reference": reference}

    def _encode(self, texts: list[str]) -> Cond:
        layers = {} if self.config.text_layers is None else {"text_encoder_out_layers": self.config.text_layers}
        length = self.config.max_sequence_length
        return {"prompt_embeds": self.pipeline.encode_prompt(texts, max_sequence_length=length, **layers)[0]}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(C, height, width): each a patch of 2 x 2 latents of the VAE, and a token of the net."""
        return image_shape(size, self.pipeline.transformer.config.in_channels, 2 * self.pipeline.vae_scale_factor)

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The scheduler's table, shifted by the number of tokens and of steps."""
        _, height, width = self.latent_shape(size)
        mu = compute_empirical_mu(height * width, steps)
        return shifted_schedule(self.pipeline.scheduler.config, steps, height * width, mu=mu)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity noise - clean [B, C, h, w]."""
        pipeline, embeds, reference = self.pipeline, cond["prompt_embeds"], cond.get("reference")
        tokens, places = pipeline._pack_latents(x), pipeline._prepare_latent_ids(x[:1])
        if reference is not None:
            tokens = torch.cat([tokens, pipeline._pack_latents(reference)], 1)
            places = torch.cat([places, pipeline._prepare_image_ids([reference[:1]])], 1)
        output = self.nets["transformer"](
            tokens,
            embeds,
            time / 1000,
            places.to(x.device),
            pipeline._prepare_text_ids(embeds[:1]).to(x.device),
            time.new_full((len(x),), self.config.guidance) if self.told else None,
            return_dict=False,
        )[0]
        return output[:, : x[0, 0].numel()].transpose(1, 2).reshape(x.shape)

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]."""
        vae = self.pipeline.vae
        mean, variance = (stat.reshape(-1, 1, 1) for stat in (vae.bn.running_mean, vae.bn.running_var))
        scaled = latents.to(vae.dtype) * (variance + vae.config.batch_norm_eps).sqrt() + mean
        return (vae.decode(self.pipeline._unpatchify_latents(scaled), return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w]: the mode of the VAE's posterior."""
        vae = self.pipeline.vae
        return self.pipeline._encode_vae_image((2 * pixels - 1).to(vae.device, vae.dtype), None)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        klein = isinstance(self.pipeline, Flux2KleinPipeline)
        distilled = {"is_distilled": self.pipeline.config.is_distilled} if klein else {}
        type(self.pipeline)(**{**self.pipeline.components, **merged(self.nets)}, **distilled).save_pretrained(folder)
