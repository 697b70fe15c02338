"""Qwen-Image: what the conformance test does not see."""

from pathlib import Path

import pytest
import torch
from diffusers import QwenImageEditPipeline

from rlalign.models import qwen_image
from rlalign.types import Prompt, Size
from tests.contracts.families.qwen_image import SIZE, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return written(tmp_path_factory.mktemp("qwen_image"))


def load(folder: Path, tokens: int = 16) -> qwen_image.Family:
    return qwen_image.Family.load(
        qwen_image.Config(max_sequence_length=tokens), str(folder), torch.float32, torch.device("cpu")
    )


def test_guidance_keeps_the_length_of_every_token():
    """Guided is (3, 4) and (1, 0) at scale 2; the conditional tokens have length 1 and 2."""
    positive, negative = torch.tensor([[[0.6, 0.8], [2.0, 0.0]]]), torch.tensor([[[-1.8, -2.4], [3.0, 0.0]]])
    guided = qwen_image.Family.guide(positive, negative, 2.0)
    torch.testing.assert_close(guided, torch.tensor([[[0.6, 0.8], [2.0, 0.0]]]))


def test_padding_of_the_text_changes_nothing(folder: Path):
    x, time = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    short, long = (
        family.predict(x, time, family.encode([Prompt("red cat")])[0], SIZE)
        for family in (load(folder, 16), load(folder, 40))
    )
    torch.testing.assert_close(short, long)


def test_images_are_encoded_as_diffusers_does(folder: Path):
    family, pixels = load(folder), torch.rand(2, 3, *SIZE[:2], generator=torch.Generator().manual_seed(0))
    parts = {name: part for name, part in family.pipeline.components.items() if name != "processor"}
    pipeline = QwenImageEditPipeline(**parts, processor=None)
    latents = pipeline._encode_vae_image((2 * pixels - 1)[:, :, None], None)
    packed = pipeline._pack_latents(latents, 2, 4, SIZE.height // 2, SIZE.width // 2)
    torch.testing.assert_close(family.encode_images(pixels, SIZE), packed)


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match="no QwenImagePipeline could be loaded from '/nowhere'"):
        load(Path("/nowhere"))


def test_the_shift_depends_on_the_size(folder: Path):
    family = load(folder)
    small, large = (family.schedule(4, Size(side, side)).sigma for side in (16, 64))
    assert (large[1:-2] > small[1:-2]).all() and large[-2] == pytest.approx(0.02, abs=1e-6)
