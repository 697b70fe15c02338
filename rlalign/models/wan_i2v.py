"""Wan 2.1 and 2.2 (arXiv 2503.20314), image to video, through diffusers: a film that begins with the prompt's image.

As the family wan, with CLIP's view of the image too where the net takes one. Wan 2.2 with 5 billion weights has the
image as its first frame and makes the others: here that frame has noise as well, which the net never sees, and a
velocity that leads to the image. Tried with tiny random weights only, against diffusers' own pipeline; never with the
published ones.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import final

import torch
from diffusers import WanImageToVideoPipeline
from pydantic import Field
from torch import Tensor, nn

from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.flow_match import load_pipeline
from rlalign.models.images import shown
from rlalign.models.lora import freeze, merged
from rlalign.models.video import by_expert, decode_video, encode_video, experts, latent_axes, own_schedule
from rlalign.settings import Settings
from rlalign.types import Cond, Prompt, Schedule, Size


class Config(Settings):
    """What a run file may say about this family."""

    frames: int = Field(default=81, ge=1)
    """Frames of a film, as in rollout.size: the image is encoded together with those that are to come."""


@final
class Family:
    """One pipeline folder or Hub id. Everything is frozen and in evaluation mode until a policy says what trains."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")  # as flow_grpo
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, config: Config, pipeline: WanImageToVideoPipeline) -> None:
        self.config = config
        self.pipeline = pipeline
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                freeze(part)
        self.nets, self.boundary = experts(pipeline)
        self.dtype = pipeline.transformer.dtype  # of most weights: some stay in float32

    @staticmethod
    def load(config: Config, path: str, dtype: torch.dtype, device: torch.device | str) -> "Family":
        return Family(config, load_pipeline(WanImageToVideoPipeline, path, dtype).to(device))

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        """prompt_embeds [P, 512, C], condition [P, C, f, h, w], what is known of the film, image_embeds [P, T, C]."""
        pipeline, pixels = self.pipeline, shown(prompts)
        embeds, uncond_embeds = pipeline.encode_prompt(
            [prompt.text for prompt in prompts],
            [prompt.negative or "" for prompt in prompts],
            max_sequence_length=512,  # the nets count on it
        )
        image: Cond = {"condition": torch.cat([self._condition(one) for one in pixels.split(1)]).to(embeds.dtype)}
        if pipeline.transformer.config.image_dim is not None:
            pictures = pipeline.video_processor.numpy_to_pil(pipeline.video_processor.pt_to_numpy(pixels))
            image["image_embeds"] = pipeline.encode_image(pictures, pipeline.image_encoder.device)
        return {"prompt_embeds": embeds, **image}, {"prompt_embeds": uncond_embeds, **image}

    def _condition(self, pixels: Tensor) -> Tensor:
        """Which frames are known, and the latents of a film with this first one [1, 3, H, W] and grey ones after.

        Where the net is told times token by token: the latent of this frame alone.
        """
        pipeline, (height, width) = self.pipeline, pixels.shape[-2:]
        shape = (1, pipeline.vae.config.z_dim, height, width, self.config.frames)
        given = {"generator": None, "latents": pixels.new_zeros(1)}  # without these it would draw some
        device = pipeline.vae.device
        return pipeline.prepare_latents(2 * pixels - 1, *shape, torch.float32, device, **given)[1]

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        """(C, frames, height, width)."""
        vae = self.pipeline.vae.config
        patch = self.pipeline.transformer.config.patch_size[-1]
        axes = latent_axes(size, vae.scale_factor_spatial, vae.scale_factor_temporal, patch)
        if size.frames != self.config.frames:
            raise ValueError(
                f"size {list(size)}: model.frames is {self.config.frames}, and must be the size's third number"
            )
        return vae.z_dim, *axes

    def schedule(self, steps: int, size: Size) -> Schedule:
        """The scheduler's table, with exact times where the first frame is given: its velocity is made of them."""
        own = own_schedule(self.pipeline.scheduler, steps)
        return replace(own, time=1000 * own.sigma) if self.pipeline.config.expand_timesteps else own

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        """Velocity noise - clean [B, C, F, h, w]."""
        if self.pipeline.config.expand_timesteps:
            return self._after_first_frame(x, time, cond)
        return self._velocity(torch.cat([x, cond["condition"]], 1), time, time, cond)

    def _after_first_frame(self, x: Tensor, time: Tensor, cond: Cond) -> Tensor:
        """The net sees the given frame at time 0; there (x - clean) / t leads to it."""
        clean, (_, tall, wide) = cond["condition"], self.pipeline.transformer.config.patch_size  # [B, C, 1, h, w]
        mask = torch.ones_like(x[:, 0, :, ::tall, ::wide], dtype=time.dtype)  # [B, F, rows, columns]
        mask[:, 0] = 0
        told = (mask * time[:, None, None, None]).flatten(1)
        velocity = self._velocity(torch.cat([clean, x[:, :, 1:]], 2), told, time, cond)
        led = (x[:, :, :1] - clean) / (time.reshape(-1, 1, 1, 1, 1) / 1000)
        return torch.cat([led.to(x.dtype), velocity[:, :, 1:]], 2)

    def _velocity(self, latents: Tensor, told: Tensor, time: Tensor, cond: Cond) -> Tensor:
        image = cond.get("image_embeds")
        text = cond["prompt_embeds"].to(self.dtype), None if image is None else image.to(self.dtype)
        inputs = (latents.to(self.dtype), told, *text)
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
        parts = {**self.pipeline.components, **merged(self.nets), **settings}
        WanImageToVideoPipeline(**parts).save_pretrained(folder)
