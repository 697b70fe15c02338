"""The safety classifier and the similarity for editing against transformers' own path through the processor."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoImageProcessor,
    CLIPModel,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from rlalign.types import Prompt
from rlalign_rewards.image_similarity import ImageSimilarity
from rlalign_rewards.nsfw import Nsfw
from tests.rewards.tiny import SIDE, SMALL_VIT, classifier_folder, clip_folder, dino_folder, pictures

NOTHING = [Prompt("")] * 6


def test_nsfw_is_the_probability_of_all_safe_labels(tmp_path: Path) -> None:
    options, images = classifier_folder(tmp_path), pictures(4, 40, 60)
    network = ViTForImageClassification.from_pretrained(tmp_path).eval()
    pixels = ViTImageProcessor.from_pretrained(tmp_path)(images=list(images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = network(pixels).logits.softmax(-1)[:, 0]
    torch.testing.assert_close(Nsfw(**options)(images, NOTHING[:4])["score"], expected)
    both = Nsfw(**options, unsafe=["nsfw", "normal"])(images, NOTHING[:4])["score"]
    torch.testing.assert_close(both, torch.zeros(4), atol=1e-6, rtol=0)


def test_of_a_video_the_worst_frame_is_told(tmp_path: Path) -> None:
    reward, images = Nsfw(**classifier_folder(tmp_path)), pictures(6)
    each = reward(images, NOTHING)["score"].reshape(2, 3)
    whole = reward(images.reshape(2, 3, 3, 32, 32), NOTHING[:2])
    torch.testing.assert_close(whole["score"], each.mean(1))
    torch.testing.assert_close(whole["worst"], each.amin(1))


def test_labels_that_the_classifier_lacks_are_refused(tmp_path: Path) -> None:
    options = classifier_folder(tmp_path)
    with pytest.raises(ValueError, match="has no label porn; it has normal, nsfw"):
        Nsfw(**options, unsafe=["porn"])
    with pytest.raises(ValueError, match="has no label to look for"):
        Nsfw(**options, unsafe=[])
    with pytest.raises(ValueError, match="hf download Falconsai/nsfw_image_detection"):
        Nsfw()


def edits(count: int, height: int, width: int) -> list[Prompt]:
    return [Prompt("bluer", image=image) for image in pictures(count, height, width, seed=5)]


@pytest.mark.parametrize("kind", ["dinov2", "vit", "clip"])
def test_similarity_is_the_cosine_of_transformers_embeddings(kind: str, tmp_path: Path) -> None:
    images, prompts = pictures(3, 64, 48), edits(3, 64, 48)
    if kind == "clip":
        clip_folder(tmp_path)
        network = CLIPModel.from_pretrained(tmp_path).eval()
    elif kind == "vit":
        ViTModel(ViTConfig(**SMALL_VIT)).save_pretrained(tmp_path)
        ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
        network = ViTModel.from_pretrained(tmp_path).eval()
    else:
        dino_folder(tmp_path)
        network = Dinov2Model.from_pretrained(tmp_path).eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path)

    def embedded(pixels: list[torch.Tensor]) -> torch.Tensor:
        pixels = processor(images=pixels, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            if kind == "clip":
                return network.visual_projection(network.vision_model(pixels).pooler_output)
            return network(pixels).last_hidden_state[:, 0]

    expected = torch.cosine_similarity(embedded(list(images)), embedded([prompt.image for prompt in prompts]))
    ours = ImageSimilarity(model=str(tmp_path))(images / 255, prompts)
    torch.testing.assert_close(ours, expected, atol=2e-3, rtol=0)


def test_the_unchanged_picture_is_most_similar(tmp_path: Path) -> None:
    reward, prompts = ImageSimilarity(**dino_folder(tmp_path)), edits(3, 32, 32)
    same = torch.stack([prompt.image for prompt in prompts if prompt.image is not None]) / 255
    torch.testing.assert_close(reward(same, prompts), torch.ones(3))
    assert (reward(pictures(3) / 255, prompts) < 0.999).all()
    video = torch.stack([same, pictures(3) / 255], 1)
    torch.testing.assert_close(reward(video, prompts), (1 + reward(pictures(3) / 255, prompts)) / 2)


def test_a_prompt_without_an_image_is_refused(tmp_path: Path) -> None:
    reward = ImageSimilarity(**dino_folder(tmp_path))
    with pytest.raises(ValueError, match="compares with the image of a prompt, and 'a cat' has none"):
        reward(pictures(1) / 255, [Prompt("a cat")])
