"""Qwen-Image: true guidance with rescaled norms, text padded behind a mask, a dynamic shift with a terminal level."""

import re
from collections.abc import Sequence
from pathlib import Path
from string import ascii_lowercase

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case

SIZE = Size(16, 24)
TOKENS = 16
SYSTEM = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:user\nassistant"
)


class PlainQwenImage:
    def __init__(self, folder: Path) -> None:
        self.pipeline = QwenImagePipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 24, 16), steps, 1.0)
        return self.pipeline.scheduler.sigmas, self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        return self.pipeline(
            prompt=[prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or " " for prompt in prompts],
            true_cfg_scale=guidance,
            latents=latents,
            num_inference_steps=steps,
            height=SIZE.height,
            width=SIZE.width,
            max_sequence_length=TOKENS,
            output_type="pt",
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def tokenizer() -> Qwen2Tokenizer:
    """A token a word for the pipeline's template, which then has the 34 tokens that it drops; letters for the rest."""
    symbols = ["<|endoftext|>", "Ġ", "Ċ", *ascii_lowercase]
    made = Qwen2Tokenizer(vocab={symbol: index for index, symbol in enumerate(symbols)})
    made.add_tokens(["<|im_start|>", "<|im_end|>", *dict.fromkeys(re.findall(r" ?\w+|[^\w ]", SYSTEM))])
    return made


def text_encoder(words: int) -> Qwen2_5_VLForConditionalGeneration:
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "num_key_value_heads": 2,
            "rope_parameters": rope,
            "vocab_size": words,
            "eos_token_id": 0,
            "bos_token_id": 0,
        },
        vision_config=vision,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def transformer(zero_cond_t: bool = False) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
        zero_cond_t=zero_cond_t,
    )


def vae() -> AutoencoderKLQwenImage:
    """Halves the sides, as far as a picture goes."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 1.2, 0.8],
    )


def written(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words = tokenizer()
        QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True, base_image_seq_len=4, max_shift=2.0, shift_terminal=0.02
            ),
            vae=vae(),
            text_encoder=text_encoder(len(words)),
            tokenizer=words,
            transformer=transformer(),
        ).save_pretrained(folder)
    return folder


CASES = {
    "qwen_image": Case(
        module="qwen_image",
        write=written,
        plain=PlainQwenImage,
        size=SIZE,
        config={"max_sequence_length": TOKENS},
        least_steps=2,
    )
}
