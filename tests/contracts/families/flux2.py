"""FLUX.2: klein, text to image and with a reference image, and dev, which is told its guidance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen3ForCausalLM,
)

from rlalign.types import Prompt, Size
from tests.contracts.families import qwen3
from tests.contracts.families.case import Case

SIZE = Size(16, 24)
TOKENS = 16
LAYERS = (1, 2)  # of the text encoder
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if message['role'] == 'user' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


class PlainFlux2:
    """One prompt after the other: the pipeline shows all prompts of a call the same images."""

    def __init__(self, folder: Path) -> None:
        self.pipeline = DiffusionPipeline.from_pretrained(folder)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.image_processor.check_image_input = lambda image: image  # which wants 64 pixels a side

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 16, 4, 6), steps, 1.0)
        return self.pipeline.scheduler.sigmas, self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        rows = zip(prompts, latents.split(1), strict=True)
        return torch.cat([self._draw(prompt, own, steps, guidance) for prompt, own in rows])

    def _draw(self, prompt: Prompt, latents: Tensor, steps: int, guidance: float) -> Tensor:
        text = {"max_sequence_length": TOKENS, "text_encoder_out_layers": LAYERS}
        if isinstance(self.pipeline, Flux2KleinPipeline):
            away, _ = self.pipeline.encode_prompt(prompt.negative or "", **text)
            guided = {"guidance_scale": guidance, "negative_prompt_embeds": away}
        else:
            guided = {"guidance_scale": 2.5}
        return self.pipeline(
            image=None if prompt.image is None else to_pil_image(prompt.image),
            prompt=prompt.text,
            latents=latents,
            num_inference_steps=steps,
            height=SIZE.height,
            width=SIZE.width,
            output_type="pt",
            **text,
            **guided,
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def transformer(told: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16 * len(LAYERS),
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=told,
    )


def vae() -> AutoencoderKLFlux2:
    """Halves the sides; statistics that a test sees."""
    made = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    made.bn.running_mean.copy_(torch.linspace(-0.2, 0.3, 16))
    made.bn.running_var.copy_(torch.linspace(0.5, 1.5, 16))
    return made


def common(told: bool) -> dict[str, Any]:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return {"scheduler": scheduler, "vae": vae(), "transformer": transformer(told)}


def klein(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Qwen3ForCausalLM(qwen3.config(2))
        Flux2KleinPipeline(
            text_encoder=encoder, tokenizer=qwen3.tokenizer(), is_distilled=False, **common(False)
        ).save_pretrained(folder)
    return folder


def dev(folder: Path) -> Path:
    words = qwen3.tokenizer()
    words.add_tokens(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    images = PixtralImageProcessor(size={"longest_edge": 8}, patch_size={"height": 4, "width": 4})
    processor = PixtralProcessor(image_processor=images, tokenizer=words, chat_template=CHAT)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    few = {"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.2}
    vision = {"image_size": 8, "patch_size": 4, "num_channels": 3, "head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = Mistral3Config(
            text_config={"model_type": "mistral", "vocab_size": len(words), **text, **few},
            vision_config={"model_type": "pixtral", **text, **vision},
            image_token_index=processor.image_token_id,
        )
        encoder = Mistral3ForConditionalGeneration(config)
        Flux2Pipeline(text_encoder=encoder, tokenizer=processor, **common(True)).save_pretrained(folder)
    return folder


CONFIG: dict[str, Any] = {"max_sequence_length": TOKENS, "text_layers": LAYERS}
CASES = {
    "flux2-klein": Case("flux2", klein, PlainFlux2, SIZE, CONFIG),
    "flux2-reference": Case("flux2", klein, PlainFlux2, SIZE, CONFIG, images=True),
    "flux2-dev": Case("flux2", dev, PlainFlux2, SIZE, {**CONFIG, "guidance": 2.5}, guided=False),
}
