"""MPS against its formula, token by token and head by head."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from rlalign.types import Prompt
from rlalign_rewards._networks import CLIP_MEAN, CLIP_STD
from rlalign_rewards.mps import Mps
from tests.rewards.tiny import SIDE, mps_file, pictures

PROMPTS = [Prompt("a red face in the light"), Prompt("three dogs on the left, in oil")]
WORDS = "quantity, attributes, position, number, location"


def glu(x: Tensor) -> Tensor:
    x, gate = x.chunk(2, dim=-1)
    return x * gate * torch.sigmoid(gate)


def heads(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """One sample: query [S, heads * 64], key and value [T, 64]."""
    parts = [
        ((part @ key.T / 8).masked_fill(~allowed, -math.inf).softmax(-1)) @ value for part in query.split(64, dim=-1)
    ]
    return torch.cat(parts, dim=-1)


def turned(x: Tensor) -> Tensor:
    """Rotary places as complex numbers. x: [S, n * 64]"""
    angle = torch.arange(len(x))[:, None] / 1e4 ** (torch.arange(32) / 32)
    parts = []
    for part in x.split(64, dim=-1):
        z = torch.complex(part[:, :32], part[:, 32:]) * torch.polar(torch.ones_like(angle), angle)
        parts += [z.real, z.imag]
    return torch.cat(parts, dim=-1)


def crossed(state: dict[str, Tensor], x: Tensor, words: Tensor, allowed: Tensor) -> Tensor:
    for number in range(4):
        at = f"cross_model.layers.{number}.%d.fn.%s.weight"
        cross = {name: state[at % (0, name)] for name in ("norm", "to_q", "to_kv", "to_out", "ff.0", "ff.2")}
        y = F.layer_norm(x, x.shape[-1:], cross["norm"])
        key, value = (words @ cross["to_kv"].T).chunk(2, dim=-1)
        out = heads(y @ cross["to_q"].T, key, value, allowed) @ cross["to_out"].T
        x = x + out + glu(y @ cross["ff.0"].T) @ cross["ff.2"].T
        own = {name: state[at % (1, name)] for name in ("norm", "fused_attn_ff_proj", "attn_out", "ff_out.1")}
        y = F.layer_norm(x, x.shape[-1:], own["norm"])
        query, key, value, wide = (y @ own["fused_attn_ff_proj"].T).split([128, 64, 64, 48], dim=-1)
        out = heads(turned(query), turned(key), value, torch.ones(len(x), dtype=torch.bool)) @ own["attn_out"].T
        x = x + out + glu(wide) @ own["ff_out.1"].T
    return x


def test_the_score_is_the_published_formula(tmp_path: Path) -> None:
    options, images = mps_file(tmp_path), pictures(2, SIDE, SIDE) / 255
    state, clip = torch.load(tmp_path / "mps.pth"), CLIPModel.from_pretrained(tmp_path).eval()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)

    def read(text: str) -> tuple[Tensor, Tensor]:
        tokens = tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        answer = clip.text_model(input_ids=tokens["input_ids"])
        return clip.text_projection(answer.last_hidden_state)[0], clip.text_projection(answer.pooler_output)[0]

    expected = []
    with torch.no_grad():
        wanted, _ = read(WORDS)
        for image, prompt in zip(images, PROMPTS, strict=True):
            words, sentence = read(prompt.text)
            near = (words @ wanted.T).amax(1)
            pixels = (image - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
            seen = clip.visual_projection(clip.vision_model(pixels[None]).last_hidden_state)[0]
            found = crossed(state, seen, words, near / near.max() > 0.3)[0]
            expected.append(clip.logit_scale.exp() * torch.cosine_similarity(found, sentence, dim=0))
    ours = Mps(**options, dimension="semantic")(images, PROMPTS)
    torch.testing.assert_close(ours, torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_the_dimension_counts(tmp_path: Path) -> None:
    options, images = mps_file(tmp_path), pictures(2) / 255
    scores = [Mps(**options, dimension=name)(images, PROMPTS)[0].item() for name in ("overall", "quality")]
    assert scores[0] != scores[1]


def test_what_is_no_table_of_its_tensors_is_refused(tmp_path: Path) -> None:
    options = mps_file(tmp_path)
    with pytest.raises(
        ValueError, match="MPS has no dimension 'beauty'; it has aesthetics, quality, semantic, overall"
    ):
        Mps(**options, dimension="beauty")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "object.pth")
    with pytest.raises(ValueError, match="holds no weights that can be read safely"):
        Mps(str(tmp_path / "object.pth"), clip=options["clip"])
    torch.save({"model.logit_scale": torch.zeros(())}, tmp_path / "clip.pth")
    with pytest.raises(ValueError, match=r"is no MPS: it has no cross_model\."):
        Mps(str(tmp_path / "clip.pth"), clip=options["clip"])
