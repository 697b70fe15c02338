"""ImageReward (https://arxiv.org/abs/2304.05977)."""

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from rlalign.scoring import differentiable
from rlalign.types import Prompt
from rlalign_rewards._networks import (
    below,
    cropped,
    fill,
    from_hub,
    normalised,
    over_frames,
    placed,
    rating_head,
    state_dict,
    weights_file,
)

_MEAN, _STD = 0.16717362830052426, 1.0333394966054072  # of the raw ratings, as published
_LONGEST = 35  # tokens of a prompt
_HEAD_WIDTH = 64  # of every attention head, in both encoders

# BLIP's names in transformers' order of the same layers.
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
}


@differentiable
class ImageReward:
    """How content would an expert be with picture and prompt: BLIP with a linear head, differentiable.

    Model: THUDM/ImageReward on the hub, the file ImageReward.pt (1.8 GB): ViT-L/16 at 224 px, BERT with cross
    attention, and a linear head. `checkpoint` is such a repository, a folder that holds the file, or the file itself;
    `tokenizer` is bert-base-uncased or a folder. Prompts are cut at 35 tokens.
    Score: standardised as published, about N(0, 1) over the pictures it was trained on, unbounded; text-to-image models
    average -0.6 to 1.6. Of a video the mean over its frames.
    Licence: Apache-2.0 (code and weights).
    Known hacks: glossy close-ups with the subject in the middle; what stands behind the 35th token is never seen.
    Options: checkpoint, tokenizer, device (a GPU where there is one), dtype (float32, bfloat16, float16).
    """

    def __init__(
        self,
        checkpoint: str = "THUDM/ImageReward",
        tokenizer: str = "google-bert/bert-base-uncased",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        from transformers import BertTokenizerFast

        path = weights_file(checkpoint, "ImageReward.pt")
        self._tokenizer: Any = from_hub(tokenizer, BertTokenizerFast.from_pretrained)
        state = state_dict(path)
        parts = {part: below(state, part) for part in ("blip.visual_encoder.", "blip.text_encoder.", "mlp.layers.")}
        eyes, text, head = parts.values()
        if not (eyes and text and head):
            raise ValueError(f"{path} is no ImageReward: it has no {next(name for name in parts if not parts[name])}*")
        self._vision, self._reader, self._head = _vision(eyes), _reader(text), rating_head(head["0.weight"].shape[1])
        fill(self._vision, {_renamed(name): value for name, value in eyes.items()}, path)
        fill(self._reader, text, path)
        fill(self._head, head, path)
        for network, precision in ((self._vision, dtype), (self._reader, dtype), (self._head, "float32")):
            placed(network, device, precision)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[B]. images: float [B, (F,) 3, H, W] in [0, 1]"""
        return over_frames(self._rate, images, prompts)

    def _rate(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = normalised(cropped(images.float(), self._vision.config.image_size))
        seen = self._vision(pixel_values=pixels.to(self._vision.device, self._vision.dtype)).last_hidden_state
        texts = [prompt.text for prompt in prompts]
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=_LONGEST, return_tensors="pt")
        read = self._reader(
            input_ids=tokens["input_ids"].to(seen.device),
            attention_mask=tokens["attention_mask"].to(seen.device),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state  # [B, tokens, D]
        return (self._head(read[:, 0].float())[:, 0] - _MEAN) / _STD


def _renamed(name: str) -> str:
    if name.startswith("norm."):
        return f"post_layernorm.{name.removeprefix('norm.')}"
    for theirs, ours in _VISION.items():
        name = name.replace(theirs, ours)
    return name


def _depth(state: Mapping[str, Tensor], place: int) -> int:
    """How many layers: their number stands at this place of the dotted names."""
    numbers = (name.split(".")[place] for name in state if len(name.split(".")) > place)
    return 1 + max(int(number) for number in numbers if number.isdigit())


def _vision(state: Mapping[str, Tensor]) -> Any:
    """Of the sizes that the tensors have."""
    from transformers import BlipVisionConfig, BlipVisionModel

    patch, width = state["patch_embed.proj.weight"].shape[-1], state["cls_token"].shape[-1]
    return BlipVisionModel(
        BlipVisionConfig(
            hidden_size=width,
            intermediate_size=state["blocks.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=_depth(state, 1),
            num_attention_heads=width // _HEAD_WIDTH,
            image_size=patch * isqrt(state["pos_embed"].shape[1] - 1),
            patch_size=patch,
            layer_norm_eps=1e-6,
        )
    )


def _reader(state: Mapping[str, Tensor]) -> nn.Module:
    """Of the sizes that the tensors have; `is_decoder` is what gives it cross attention, it attends both ways."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    words, width = state["embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=state["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_depth(state, 2),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=state["embeddings.position_embeddings.weight"].shape[0],
        is_decoder=True,
    )
    return BlipTextModel(config, add_pooling_layer=False)
