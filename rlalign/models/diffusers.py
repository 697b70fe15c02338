"""Any text-to-image pipeline of diffusers that follows the common conventions, tried against its own call on loading.

It has one net (transformer or unet), a VAE of images, and an encode_prompt that returns all that the net is told. On
loading, the pipeline makes a small sample in two steps, and so does this family: where the two differ it is refused.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from pydantic import Field
from torch import Tensor, nn

from rlalign.models.agreement import distance, replaced
from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.conventions import ARGUMENTS, deterministic, encoded_prompts, missing, net_names
from rlalign.models.flow_match import load_pipeline
from rlalign.models.images import decoded, encoded, from_ddim, from_scheduler, image_shape
from rlalign.models.lora import freeze, merged
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the latents' norm; half precision takes more


class Config(Settings):
    """What a run file may say about this family."""

    time_scale: float = Field(default=1.0, gt=0)
    """The net is told times from 0 to 1000 times this: 0.001 where it expects 0 to 1."""


@final
class Family:
    """One pipeline folder or Hub id. Everything is frozen and in evaluation mode until a policy says what trains."""

    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")  # as most of diffusers' scripts
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, pipeline: Any) -> None:
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets: dict[str, nn.Module] = {name: pipeline.components[name] for name in net_names(pipeline)}
        self.net: Any = self.nets[net_names(pipeline)[0]]
        self.sampler = deterministic(pipeline.scheduler)
        vp = isinstance(self.sampler, DDIMScheduler)
        self.prediction: PredictionType = self.sampler.config.prediction_type if vp else "velocity"

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        pipeline = load_pipeline(DiffusionPipeline, path, dtype).to(device)
        refusal = f"{type(pipeline).__name__} needs a family of its own: "
        if lacks := missing(pipeline):
            raise ValueError(f"{refusal}family diffusers wants {lacks}")
        family = Family(config, pipeline)
        side = min(family.net.config.get("sample_size") or 32, 32) * pipeline.vae_scale_factor
        try:
            away = distance(family, pipeline, family.sampler, Size(side, side))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{refusal}its call cannot be followed: {error}") from error
        if not away < TOLERANCE.get(dtype, 0.1):
            hint = "if its net is told times from 0 to 1, set model.time_scale to 0.001"
            raise ValueError(f"{refusal}family diffusers makes latents that are {away:.2g} away from its own; {hint}")
        return family

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """What encode_prompt returns and the net takes, each [P, ...], by the names of the former."""
        texts, negatives = [prompt.text for prompt in prompts], [prompt.negative or "" for prompt in prompts]
        values = encoded_prompts(self.pipeline, texts, negatives)
        taken = inspect.signature(self.net.forward).parameters
        names = [name for name in ARGUMENTS if name in values and ARGUMENTS[name] in taken]
        cond, uncond = ({name: values[f"{start}{name}"] for name in names} for start in ("", "negative_"))
        for tensors in (cond, uncond):
            tensors.update({name: tensor.bool() for name, tensor in tensors.items() if name.endswith("mask")})
        return cond, uncond

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        net = self.net.config
        return image_shape(size, net.in_channels, self.pipeline.vae_scale_factor, net.get("patch_size") or 1)

    def schedule(self, steps: int, size: Size) -> Schedule:
        """Euler's table on the flow path and DDIM's on any other, with the settings of the pipeline's scheduler."""
        sampler = type(self.sampler).from_config(self.sampler.config)
        sampler.set_timesteps(steps)
        return from_ddim(sampler) if isinstance(sampler, DDIMScheduler) else from_scheduler(sampler)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """In terms of ``prediction`` [B, C, h, w]; a learned variance beside it is dropped."""
        told = {ARGUMENTS[name]: tensor for name, tensor in cond.items()}
        output = self.net(x, timestep=time * self.config.time_scale, **told, return_dict=False)[0]
        return output[:, : x.shape[1]]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """[B, C, h, w] -> [B, 3, H, W] in [0, 1]."""
        return decoded(self.pipeline.vae, latents)

    def encode_images(self, pixels: Tensor, size: Size) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, C, h, w]: the mean of the VAE's posterior."""
        return encoded(self.pipeline.vae, pixels)

    def save_pipeline(self, folder: Path) -> None:
        """A folder that plain diffusers loads, adapters added into the weights."""
        with replaced(self.pipeline, merged(self.nets)):
            self.pipeline.save_pretrained(folder)
