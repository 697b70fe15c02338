"""Qwen-Image-Edit and Plus: as Qwen-Image, with an image among the text and its tokens beside those of the sample."""

import re
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from rlalign.types import Prompt
from tests.contracts.families import qwen_image
from tests.contracts.families.case import Case, with_image
from tests.contracts.families.qwen_image import SIZE

TOKENS, AREA, TEXT_AREA = 32, 32 * 32, 64 * 64
VISION = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
SYSTEM = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate.user\nassistant"
)


class PlainQwenImageEdit:
    """Prompt by prompt: of several images the pipeline would show the language model ones of another size."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([with_image(Prompt("a"), 0, SIZE)], torch.zeros(1, 24, 16), steps, 1.0)
        return self.pipeline.scheduler.sigmas, self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        sides = pipeline_qwenimage_edit.calculate_dimensions
        areas = {"VAE_IMAGE_SIZE": AREA, "CONDITION_IMAGE_SIZE": TEXT_AREA}
        with (
            patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: sides(AREA, ratio)),
            patch.multiple(pipeline_qwenimage_edit_plus, **areas),
        ):
            rows = zip(prompts, latents.split(1), strict=True)
            return torch.cat([self._draw(prompt, row, steps, guidance) for prompt, row in rows])

    def _draw(self, prompt: Prompt, latents: Tensor, steps: int, guidance: float) -> Tensor:
        assert prompt.image is not None
        return self.pipeline(
            image=Image.fromarray(prompt.image.permute(1, 2, 0).numpy()),
            prompt=prompt.text,
            negative_prompt=prompt.negative or " ",
            true_cfg_scale=guidance,
            latents=latents,
            num_inference_steps=steps,
            height=SIZE.height,
            width=SIZE.width,
            output_type="pt",
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def tokenizer() -> Qwen2Tokenizer:
    """A token a word of the template, of which 64 are dropped; letters for the rest."""
    made = qwen_image.tokenizer()
    made.add_tokens([*VISION, *dict.fromkeys(re.findall(r" ?\w+|[^\w ]", SYSTEM))])
    return made


def text_encoder(words: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    start, image, end, video = words.convert_tokens_to_ids(VISION)
    plain = qwen_image.text_encoder(len(words)).config
    config = Qwen2_5_VLConfig(
        text_config=plain.text_config,
        vision_config=plain.vision_config,
        vision_start_token_id=start,
        image_token_id=image,
        vision_end_token_id=end,
        video_token_id=video,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def written(folder: Path, plus: bool = False) -> Path:
    """Plus as of 2511, which is told that the image is clean."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words = tokenizer()
        (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_image_seq_len=4, max_shift=2.0, shift_terminal=0.02
            ),
            vae=qwen_image.vae(),
            text_encoder=text_encoder(words),
            tokenizer=words,
            processor=Qwen2VLProcessor(Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor()),
            transformer=qwen_image.transformer(zero_cond_t=plus),
        ).save_pretrained(folder)
    return folder


CASES = {
    name: Case(
        module="qwen_image_edit",
        write=lambda folder, plus=plus: written(folder, plus),
        plain=PlainQwenImageEdit,
        size=SIZE,
        config={"max_sequence_length": TOKENS, "reference_area": AREA, "text_area": TEXT_AREA},
        least_steps=2,
        images=True,
    )
    for name, plus in (("qwen_image_edit", False), ("qwen_image_edit-plus", True))
}
