"""Wan, image to video: 2.1 with CLIP's view of the image, 2.2 with two experts, and 2.2 with the first frame given."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from rlalign.types import Prompt
from tests.contracts.families import wan
from tests.contracts.families.case import Case, with_image
from tests.contracts.families.wan import SIZE
from tests.tiny import t5_tokenizer


class PlainWanI2V:
    """Prompt by prompt: the pipeline takes one image in a call."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = WanImageToVideoPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([with_image(Prompt("a"), 0, SIZE)], torch.zeros(1, 4, 2, 2, 4), steps, 1.0)
        return wan.from_one(self.pipeline.scheduler.sigmas), self.pipeline.scheduler.timesteps.float()

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        rows = zip(prompts, latents.split(1), strict=True)
        return torch.cat([self._draw(prompt, row, steps, guidance) for prompt, row in rows])

    def _draw(self, prompt: Prompt, latents: Tensor, steps: int, guidance: float) -> Tensor:
        assert prompt.image is not None
        return self.pipeline(
            image=Image.fromarray(prompt.image.permute(1, 2, 0).numpy()),
            prompt=prompt.text,
            negative_prompt=prompt.negative or "",
            guidance_scale=guidance,
            latents=latents,
            num_inference_steps=steps,
            height=SIZE.height,
            width=SIZE.width,
            num_frames=SIZE.frames,
            output_type="pt",
        ).frames

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def transformer(image_dim: int | None, channels: int = 12) -> WanTransformer3DModel:
    """Takes 4 latents, 4 marks of known frames and 4 known latents; of the model that is given the first frame 4."""
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=image_dim,
        added_kv_proj_dim=None if image_dim is None else 24,
    )


def clip() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            initializer_factor=5.0,
        )
    )


def written(folder: Path, version: str) -> Path:
    experts, given = (2 if version == "2.2" else 1), version == "2.2-5b"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sees = version == "2.1"
        nets = [transformer(8 if sees else None, 4 if given else 12) for _ in range(experts)]
        processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        WanImageToVideoPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=wan.text_encoder(),
            vae=wan.vae(),
            scheduler=wan.euler() if experts == 1 else wan.unipc(),
            image_processor=processor if sees else None,
            image_encoder=clip() if sees else None,
            transformer=nets[0],
            transformer_2=nets[1] if experts == 2 else None,
            boundary_ratio=0.9 if experts == 2 else None,
            expand_timesteps=given,
        ).save_pretrained(folder)
    return folder


CASES = {
    f"wan_i2v-{version}": Case(
        module="wan_i2v",
        write=lambda folder, version=version: written(folder, version),
        plain=PlainWanI2V,
        size=SIZE,
        config={"frames": SIZE.frames},
        images=True,
    )
    for version in ("2.1", "2.2", "2.2-5b")
}
