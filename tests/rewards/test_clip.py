"""CLIP's rewards against other implementations on the same tiny weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor

from rlalign.types import Prompt
from rlalign_rewards import _networks
from rlalign_rewards.aesthetic import Aesthetic
from rlalign_rewards.clipscore import ClipScore
from rlalign_rewards.hpsv2 import Hpsv2
from rlalign_rewards.pickscore import PickScore
from tests.rewards.tiny import SIDE, clip_folder, head_file, open_clip_file, pictures

PROMPTS = [Prompt("a red circle"), Prompt("Two dogs, on the LEFT!"), Prompt("a red circle"), Prompt("rain " * 90)]
LEVELS = 2 / 255  # what Pillow's rounding to 8 bits can change in a resized picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return open_clip_file(tmp_path_factory.mktemp("open_clip"))


def pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in images]


def cosines(folder: str, images: Tensor) -> Tensor:
    """As the public code of PickScore has it: one processor for both, padded to the longest text."""
    network, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    texts = [prompt.text for prompt in PROMPTS]
    inputs = processor(
        images=pil(images), text=texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        answer = network(**inputs)
    return (answer.image_embeds * answer.text_embeds).sum(-1)


# --- preprocessing


@pytest.mark.parametrize(("height", "width"), [(64, 64), (28, 28), (48, 80), (90, 40), (20, 20)])
def test_the_crop_is_that_of_transformers(height: int, width: int) -> None:
    images = pictures(2, height, width)
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    expected = processor(images=pil(images), return_tensors="pt")["pixel_values"]
    ours = _networks.normalised(_networks.cropped(images / 255, SIDE))
    assert (ours - expected).abs().max() <= LEVELS / min(_networks.CLIP_STD)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_the_crop_is_that_of_open_clip(height: int, width: int) -> None:
    images = pictures(2, height, width)
    transform = open_clip.image_transform(SIDE, is_train=False)
    expected = torch.stack([transform(image) for image in pil(images)])
    ours = _networks.normalised(_networks.cropped(images / 255, SIDE))
    assert (ours - expected).abs().max() <= LEVELS / min(_networks.CLIP_STD)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80), (90, 40)])
def test_the_padding_is_that_of_open_clip(height: int, width: int) -> None:
    images = pictures(2, height, width)
    transform = open_clip.image_transform(SIDE, is_train=False, resize_mode="longest", fill_color=0)
    expected = torch.stack([transform(image) for image in pil(images)])
    ours = _networks.normalised(_networks.padded(images / 255, SIDE))
    assert (ours - expected).abs().max() <= LEVELS / min(_networks.CLIP_STD)


def test_the_gradient_of_the_crop_is_that_of_finite_differences() -> None:
    image = (0.2 + 0.6 * torch.rand(1, 3, 9, 11, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda pixels: _networks.cropped(pixels, 6), image)


# --- scores


def test_clipscore_is_transformers_cosine(folder: str) -> None:
    images = pictures(4, SIDE, SIDE)
    ours = ClipScore(model=folder)(images / 255, PROMPTS)
    torch.testing.assert_close(ours, 100 * cosines(folder, images).clamp(min=0), atol=1e-4, rtol=1e-5)
    assert (ours[:3] > 0).all() and ours[3] == 0


def test_clipscore_of_open_clip_is_the_cosine_of_its_features(checkpoint: tuple[str, str]) -> None:
    model, pretrained = checkpoint
    images = pictures(4, SIDE, SIDE)
    network = open_clip.create_model(model, pretrained=pretrained).eval()
    transform = open_clip.image_transform(SIDE, is_train=False)
    with torch.no_grad():
        seen = network.encode_image(torch.stack([transform(image) for image in pil(images)]), normalize=True)
        read = network.encode_text(open_clip.tokenize([prompt.text for prompt in PROMPTS]), normalize=True)
    expected = 100 * (seen * read).sum(-1)
    ours = ClipScore(model=model, pretrained=pretrained)(images / 255, PROMPTS)
    torch.testing.assert_close(ours, expected.clamp(min=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(Hpsv2(model=model, checkpoint=pretrained)(images / 255, PROMPTS), expected / 100)


def test_pickscore_is_that_of_the_public_code(folder: str) -> None:
    images = pictures(4, SIDE, SIDE)
    scale = CLIPModel.from_pretrained(folder).logit_scale.exp().item()
    ours = PickScore(model=folder, processor=folder)(images / 255, PROMPTS)
    torch.testing.assert_close(ours, scale * cosines(folder, images))
    scaled = PickScore(model=folder, processor=folder, scale=1 / 26)(images / 255, PROMPTS)
    torch.testing.assert_close(scaled, ours / 26)


def test_a_resized_picture_scores_as_through_the_processor(folder: str) -> None:
    images = pictures(4, 64, 48)
    ours = PickScore(model=folder, processor=folder)(images / 255, PROMPTS)
    scale = CLIPModel.from_pretrained(folder).logit_scale.exp().item()
    torch.testing.assert_close(ours, scale * cosines(folder, images), atol=0.05, rtol=0)


def test_the_aesthetic_head_is_its_layers_one_after_the_other(tmp_path: Path) -> None:
    clip, head = clip_folder(tmp_path, width=768), head_file(tmp_path / "head.pth", 768)
    images = pictures(3)
    state, network = torch.load(head), CLIPModel.from_pretrained(clip).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip)(images=pil(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        x = network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)
    x = x / x.norm(dim=-1, keepdim=True)
    for layer in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
    torch.testing.assert_close(Aesthetic(head=head, clip=clip)(images / 255, PROMPTS[:3]), x[:, 0], atol=1e-4, rtol=0)


def test_of_a_video_the_mean_over_its_frames(folder: str) -> None:
    reward = ClipScore(model=folder)
    videos = pictures(6).reshape(2, 3, 3, 32, 32) / 255
    each = torch.stack([reward(videos[:, frame], PROMPTS[:2]) for frame in range(3)])
    torch.testing.assert_close(reward(videos, PROMPTS[:2]), each.mean(0))


def test_lower_precision_stays_close(folder: str) -> None:
    images = pictures(4) / 255
    exact, rough = (
        PickScore(model=folder, processor=folder, dtype=d)(images, PROMPTS) for d in ("float32", "bfloat16")
    )
    torch.testing.assert_close(rough, exact, atol=0.5, rtol=0)


# --- what is not there


@pytest.mark.parametrize(
    ("load", "complaint"),
    [
        (lambda: ClipScore(model="nobody/nothing"), "nobody/nothing could not be loaded, neither"),
        (lambda: ClipScore(model="./nothing"), "there is no ./nothing"),
        (lambda: ClipScore(model="ViT-Z", pretrained="openai"), "open_clip has no architecture 'ViT-Z'"),
        (
            lambda: ClipScore(model="ViT-B-32", pretrained="laion2b_s34b_b79k"),
            r"run `open_clip\.create_model\('ViT-B-32'",
        ),
        (lambda: PickScore(dtype="int8"), "yuvalkirstain/PickScore_v1 could not be loaded"),
        (lambda: Hpsv2(version="v3"), "HPSv2 has no version 'v3'; there are v2.0 and v2.1"),
        (lambda: Hpsv2(), "xswu/HPSv2 could not be loaded"),
        (lambda: Hpsv2(checkpoint="./nothing.pt"), "there is no nothing.pt"),
        (lambda: Aesthetic(), "hf download trl-lib/ddpo-aesthetic-predictor"),
    ],
)
def test_what_is_not_there_is_said_in_a_sentence(load: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as raised:
        load()
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_something_else_is_refused(checkpoint: tuple[str, str], folder: str, tmp_path: Path) -> None:
    model, _ = checkpoint
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, tmp_path / "thin.pt")
    with pytest.raises(ValueError, match=r"thin\.pt lacks \d+ tensors of this network"):
        Hpsv2(model=model, checkpoint=str(tmp_path / "thin.pt"))
    torch.save({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="belongs to another architecture"):
        Aesthetic(head=str(tmp_path / "other.pt"), clip=folder)
    torch.save({"state_dict": print}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt holds no weights that can be read safely"):
        Aesthetic(head=str(tmp_path / "code.pt"), clip=folder)


def test_dtypes_are_checked(folder: str) -> None:
    with pytest.raises(ValueError, match="dtype 'int8' is none of float32, bfloat16, float16"):
        ClipScore(model=folder, dtype="int8")
