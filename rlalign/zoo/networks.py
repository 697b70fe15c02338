"""The untrained parts of the scenes pipeline, in the layout of Stable Diffusion 3, and their assembly.

Sizes are chosen for one CPU thread: 16 image tokens and 10 text tokens per evaluation of the transformer.
"""

from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase, digits

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from rlalign.zoo.scenes import COUNTS, PALETTE, RELATIONS, SHAPES, SIZE, plural

TEXT_TOKENS = 10  # start, "a red circle left of a blue square", end
LATENT_CHANNELS = 8
_DOWN = 4
_START, _END = "<|startoftext|>", "<|endoftext|>"
_TEXT_WIDTHS = (64, 32)  # of the two text encoders; side by side they make the transformer's text tokens


def vocabulary() -> list[str]:
    """Words that are one token each; anything else is spelled letter by letter."""
    shapes = [*SHAPES, *map(plural, SHAPES)]
    relations = [word for relation in RELATIONS for word in relation.split()]
    return list(dict.fromkeys([*shapes, *PALETTE, *relations, *COUNTS.values(), "the", "text", "and"]))


def build_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding with the merges that build up each word of the vocabulary from its left end."""
    # Longer words first, so that no short word's first merge (an-d) breaks a longer one (tri-an-gle).
    words = sorted((word for word in vocabulary() if len(word) > 1), key=len, reverse=True)
    merges = dict.fromkeys(merge for word in words for merge in _merges(word))
    symbols = [*ascii_lowercase, *digits, *"\"'.,-"]
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(first + second for first, second in merges)]
    vocab = {token: index for index, token in enumerate([*dict.fromkeys(tokens), _START, _END])}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=TEXT_TOKENS)


def _merges(word: str) -> list[tuple[str, str]]:
    prefixes = [word[:end] for end in range(1, len(word))] + [f"{word}</w>"]
    return [(shorter, longer[len(shorter) :]) for shorter, longer in pairwise(prefixes)]


def build_vae(channels: tuple[int, ...]) -> AutoencoderKL:
    """[B, 3, 32, 32] to [B, 8, 8, 8]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        shift_factor=0.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer(width: int, layers: int) -> SD3Transformer2DModel:
    """Patches of 2x2 latents, so 16 image tokens; heads of 32."""
    return SD3Transformer2DModel(
        sample_size=SIZE // _DOWN,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=sum(_TEXT_WIDTHS),
        caption_projection_dim=width,
        pooled_projection_dim=sum(_TEXT_WIDTHS),
        pos_embed_max_size=SIZE // _DOWN // 2,
    )


def build_text_encoders(tokenizer: CLIPTokenizer) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """The layout wants two. It reads the last layer but one: three layers give two of context, one none."""
    return _text_encoder(tokenizer, _TEXT_WIDTHS[0], layers=3), _text_encoder(tokenizer, _TEXT_WIDTHS[1], layers=1)


def _text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModelWithProjection(config)
    # CLIP's own 0.02 would whisper: the second encoder hands its embeddings to the transformer as they are.
    nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)
    return encoder


class Networks(nn.Module):
    """What flow matching trains: both text encoders and the transformer."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.text_encoder, self.text_encoder_2 = build_text_encoders(build_tokenizer())
        self.transformer = build_transformer(width, layers)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As StableDiffusion3Pipeline does without T5: tokens [B, T] to text [B, T, 96] and pooled [B, 96]."""
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return text, torch.cat([output.text_embeds for output in outputs], dim=-1)

    def forward(self, noisy: Tensor, sigma: Tensor, tokens: Tensor) -> Tensor:
        """The velocity, noise - clean. noisy: [B, 8, 8, 8], sigma: [B], tokens: [B, T]"""
        text, pooled = self.encode(tokens)
        return self.transformer(noisy, text, pooled, 1000 * sigma, return_dict=False)[0]


def assemble(networks: Networks, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """The ordinary diffusers pipeline of these parts, without T5."""
    return StableDiffusion3Pipeline(
        transformer=networks.transformer,
        vae=vae,
        text_encoder=networks.text_encoder,
        tokenizer=build_tokenizer(),
        text_encoder_2=networks.text_encoder_2,
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def save(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """Transformer and VAE in half precision. The text encoders stay in float32: transformers loads them as stored,
    diffusers loads the others in float32, and only so does a call of from_pretrained without a dtype fit together.
    """
    pipeline.transformer.to(torch.float16)
    pipeline.vae.to(torch.float16)
    pipeline.save_pretrained(folder)
    for tokenizer in ("tokenizer", "tokenizer_2"):  # the two files that transformers before version 5 reads
        getattr(pipeline, tokenizer).backend_tokenizer.model.save(str(folder / tokenizer))
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def load(folder: Path, device: str = "cpu") -> StableDiffusion3Pipeline:
    """Everything in float32."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    return pipeline.to(device)
