"""ImageReward against its formula written out: timm's ViT and BERT with cross attention in plain torch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import BertTokenizer

from rlalign.types import Prompt
from rlalign_rewards._networks import CLIP_MEAN, CLIP_STD
from rlalign_rewards.imagereward import ImageReward
from tests.rewards.tiny import SIDE, imagereward_file, pictures

State = dict[str, Tensor]
PROMPTS = [Prompt("red circle"), Prompt("the dogs left"), Prompt("a red " * 40)]


def below(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)


def attend(state: State, name: str, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
    """One head. mask: [B, keys], 1 where a key counts"""
    query = linear(state, f"{name}.self.query", x)
    key, value = linear(state, f"{name}.self.key", context), linear(state, f"{name}.self.value", context)
    weight = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(mask[:, None] == 0, -torch.inf).softmax(-1)
    return norm(state, f"{name}.output.LayerNorm", linear(state, f"{name}.output.dense", weight @ value) + x)


def read(state: State, tokens: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
    words, places = (state[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    x = norm(state, "embeddings.LayerNorm", words[tokens] + places[: tokens.shape[1]])
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        x = attend(state, f"{layer}.attention", x, x, mask)
        x = attend(state, f"{layer}.crossattention", x, seen, torch.ones(seen.shape[:2]))
        wide = F.gelu(linear(state, f"{layer}.intermediate.dense", x))
        x = norm(state, f"{layer}.output.LayerNorm", linear(state, f"{layer}.output.dense", wide) + x)
    return x[:, 0]


def test_the_score_is_the_published_formula(tmp_path: Path) -> None:
    options = imagereward_file(tmp_path)
    state = torch.load(tmp_path / "ImageReward.pt")
    images = pictures(3, SIDE, SIDE) / 255

    eyes = VisionTransformer(SIDE, 7, embed_dim=128, depth=2, num_heads=2, num_classes=0).eval()
    eyes.load_state_dict(below(state, "blip.visual_encoder."))
    with torch.no_grad():
        pixels = (images - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        seen = eyes.forward_features(pixels)
    texts = [prompt.text for prompt in PROMPTS]
    tokens = BertTokenizer.from_pretrained(tmp_path)(
        texts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    x = read(below(state, "blip.text_encoder."), tokens["input_ids"], tokens["attention_mask"], seen)
    for layer in (0, 2, 4, 6, 7):
        x = linear(below(state, "mlp.layers."), str(layer), x)
    expected = (x[:, 0] - 0.16717362830052426) / 1.0333394966054072

    torch.testing.assert_close(ImageReward(**options)(images, PROMPTS), expected, atol=1e-5, rtol=1e-4)


def test_the_prompt_and_the_picture_both_count(tmp_path: Path) -> None:
    reward, images = ImageReward(**imagereward_file(tmp_path)), pictures(2) / 255
    scores = reward(images[[0, 0, 1]], [PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert len(set(scores.tolist())) == 3


def test_other_files_are_refused(tmp_path: Path) -> None:
    options = imagereward_file(tmp_path)
    state = torch.load(tmp_path / "ImageReward.pt")
    torch.save(below(state, "blip."), tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"is no ImageReward: it has no blip\.visual_encoder\."):
        ImageReward(**options)
    state.pop("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight")
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"lacks 1 tensors .*'encoder.layer.1.crossattention.self.key.weight'"):
        ImageReward(**options)
    with pytest.raises(ValueError, match="THUDM/ImageReward could not be loaded"):
        ImageReward()
