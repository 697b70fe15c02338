"""Multi-dimensional Preference Score (https://arxiv.org/abs/2405.14705)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlalign.scoring import differentiable
from rlalign.types import Prompt
from rlalign_rewards._networks import (
    cropped,
    fill,
    from_hub,
    normalised,
    over_frames,
    placed,
    state_dict,
    unit,
    weights_file,
)

# The words of each dimension: those of the prompt that lie far from all of them are not looked at.
_WORDS = {
    "aesthetics": "light, color, clarity, tone, style, ambiance, artistry",
    "quality": "shape, face, hair, hands, limbs, structure, instance, texture",
    "semantic": "quantity, attributes, position, number, location",
    "overall": "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, "
    "instance, texture, quantity, attributes, position, number, location, word, things.",
}
_NEAR = 0.3  # of the nearest token's similarity
_HEAD_WIDTH = 64


@differentiable
class Mps:
    """Which picture would people prefer, overall or in one respect: a CLIP-H with cross attention, differentiable.

    Model: the weights of Kwai-Kolors/MPS. They are published as a pickled object, which is code and is not loaded;
    `checkpoint` is the path of its table of tensors (its `state_dict()`, saved as .safetensors or by torch.save), with
    the names model.* and cross_model.*. `clip` gives architecture, tokenizer and picture size:
    laion/CLIP-ViT-H-14-laion2B-s32B-b79K or a folder. 224 px, 77 tokens. `dimension` is overall, aesthetics, quality
    or semantic.
    Score: exp(logit_scale) cos, a logit as PickScore's: only differences between pictures of one prompt mean something.
    The mask over the prompt is scaled within each sample, as the public evaluation does it one by one. Of a video the
    mean over its frames.
    Licence: see the repository of Kwai-Kolors/MPS; CLIP MIT.
    Known hacks: as PickScore; a narrower dimension is easier to exaggerate.
    Options: checkpoint, dimension, clip, device (a GPU where there is one), dtype (float32, bfloat16, float16).
    """

    def __init__(
        self,
        checkpoint: str,
        dimension: str = "overall",
        clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        device: str | None = None,
        dtype: str = "float32",
    ) -> None:
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

        if dimension not in _WORDS:
            raise ValueError(f"MPS has no dimension {dimension!r}; it has {', '.join(_WORDS)}")
        path = weights_file(checkpoint, "MPS_overall.safetensors")
        config = from_hub(clip, CLIPConfig.from_pretrained)
        pictures: Any = from_hub(clip, CLIPImageProcessor.from_pretrained)
        self._mean, self._std = pictures.image_mean, pictures.image_std
        self._tokenizer: Any = from_hub(clip, CLIPTokenizerFast.from_pretrained)
        state = state_dict(path)
        crossed = {
            name.removeprefix("cross_model.").replace(".fn.", "."): value
            for name, value in state.items()
            if name.startswith("cross_model.")
        }
        if not crossed:
            raise ValueError(f"{path} is no MPS: it has no cross_model.*")
        self._clip: Any = CLIPModel(config)
        self._cross = _CrossModel(*_sizes(crossed))
        fill(self._clip, {name.removeprefix("model."): value for name, value in state.items()}, path)
        fill(self._cross, crossed, path)
        placed(self._clip, device, dtype)
        placed(self._cross, device, dtype)
        self._scale = self._clip.logit_scale.float().exp().item()
        with torch.no_grad():
            self._wanted, _ = self._read([_WORDS[dimension]])  # [1, T, D]

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[B]. images: float [B, (F,) 3, H, W] in [0, 1]"""
        return self._scale * over_frames(self._cosines, images, prompts)

    def _cosines(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        with torch.no_grad():
            tokens, sentences = self._read([prompt.text for prompt in prompts])  # [B, T, D], [B, D]
            nearest = (tokens.float() @ self._wanted.float().mT).amax(-1)  # [B, T]
            hidden = nearest / nearest.amax(-1, keepdim=True) <= _NEAR
        images = images.to(self._clip.device, torch.float32)
        pixels = normalised(cropped(images, self._clip.config.vision_config.image_size), self._mean, self._std)
        seen = self._clip.vision_model(pixel_values=pixels.to(self._clip.dtype)).last_hidden_state
        found = self._cross(self._clip.visual_projection(seen), tokens, hidden)[:, 0]
        return (unit(found) * unit(sentences)).sum(-1)

    def _read(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of all tokens, padding included, and of the sentence."""
        longest = self._clip.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt")
        answer = self._clip.text_model(input_ids=tokens["input_ids"].to(self._clip.device))
        return self._clip.text_projection(answer.last_hidden_state), self._clip.text_projection(answer.pooler_output)


class _SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * x


class _CrossAttention(nn.Module):
    """Pictures look at words: many queries, one key and value; a feed-forward layer beside it."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.to_q = nn.Linear(width, heads * _HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * _HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(heads * _HEAD_WIDTH, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 2 * inner, bias=False), _SwiGLU(), nn.Linear(inner, width, bias=False))

    def forward(self, x: Tensor, words: Tensor, hidden: Tensor) -> Tensor:
        x = self.norm(x)
        key, value = self.to_kv(words).chunk(2, dim=-1)
        return self.to_out(_attend(self.to_q(x), key, value, self.heads, hidden)) + self.ff(x)


class _SelfAttention(nn.Module):
    """The picture's tokens among themselves with rotary places, again with one key and value."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads, self.parts = heads, (heads * _HEAD_WIDTH, _HEAD_WIDTH, _HEAD_WIDTH, 2 * inner)
        self.norm = nn.LayerNorm(width, bias=False)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(heads * _HEAD_WIDTH, width, bias=False)
        self.ff_out = nn.Sequential(_SwiGLU(), nn.Linear(inner, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value, wide = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        angles = _angles(x.shape[1], x.device)
        query = _turned(query.unflatten(-1, (self.heads, _HEAD_WIDTH)), angles[:, None]).flatten(-2)
        attended = _attend(query, _turned(key, angles), value, self.heads, None)
        return self.attn_out(attended) + self.ff_out(wide)


class _CrossModel(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, depth: int) -> None:
        super().__init__()
        sizes = (width, heads, inner)
        self.layers = nn.ModuleList(
            nn.ModuleList([_CrossAttention(*sizes), _SelfAttention(*sizes)]) for _ in range(depth)
        )

    def forward(self, x: Tensor, words: Tensor, hidden: Tensor) -> Tensor:
        """x: [B, S, D], words: [B, T, D], hidden: bool [B, T]"""
        for layer in self.layers:
            cross, own = layer.children()
            x = x + cross(x, words, hidden)
            x = x + own(x)
        return x


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, hidden: Tensor | None) -> Tensor:
    """query: [B, S, heads * d]; key, value: [B, T, d], shared by the heads; hidden: bool [B, T]"""
    queries = query.unflatten(-1, (heads, _HEAD_WIDTH)).transpose(1, 2)  # [B, heads, S, d]
    similar = queries @ key[:, None].mT / _HEAD_WIDTH**0.5
    if hidden is not None:
        similar = similar.masked_fill(hidden[:, None, None], -torch.inf)
    return (similar.softmax(-1) @ value[:, None]).transpose(1, 2).flatten(2)


def _angles(places: int, device: torch.device) -> Tensor:
    """[places, d]"""
    frequency = 1e4 ** -(torch.arange(0, _HEAD_WIDTH, 2, device=device) / _HEAD_WIDTH)
    half = torch.arange(places, device=device)[:, None] * frequency
    return torch.cat([half, half], dim=-1)


def _turned(x: Tensor, angles: Tensor) -> Tensor:
    """x: [..., d]"""
    one, other = x.chunk(2, dim=-1)
    return x * angles.cos().to(x.dtype) + torch.cat([-other, one], dim=-1) * angles.sin().to(x.dtype)


def _sizes(state: dict[str, Tensor]) -> tuple[int, int, int, int]:
    """Width, heads, inner width and depth of the cross model whose tensors these are."""
    inner, width = state["layers.0.0.to_q.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state)
    return width, inner // _HEAD_WIDTH, state["layers.0.0.ff.2.weight"].shape[1], depth
