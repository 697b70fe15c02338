"""Qwen-Image-Edit: what the conformance test does not see."""

from pathlib import Path

import pytest
import torch

from rlalign.models import qwen_image_edit
from rlalign.types import Prompt, Size
from tests.contracts.families import qwen_image
from tests.contracts.families.case import with_image
from tests.contracts.families.qwen_image_edit import AREA, SIZE, written


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return written(tmp_path_factory.mktemp("qwen_image_edit"))


def load(folder: Path, tokens: int = 32, area: int = AREA) -> qwen_image_edit.Family:
    config = qwen_image_edit.Config(max_sequence_length=tokens, reference_area=area)
    return qwen_image_edit.Family.load(config, str(folder), torch.float32, "cpu")


def test_the_image_is_enlarged_to_the_area_it_is_seen_in(folder: Path):
    """3 : 2 at 64 x 64 pixels is 64 x 64 in steps of 32, at 128 x 128 it is 96 x 160: patches of 4 x 4 pixels."""
    prompt = with_image(Prompt("red"), 0, SIZE)
    for area, tokens in ((64 * 64, 256), (128 * 128, 960)):
        family = load(folder, area=area)
        cond, _ = family.encode([prompt])
        assert cond["reference"].shape == (1, tokens, 16)
        x = torch.zeros(1, *family.latent_shape(SIZE))
        assert family.predict(x, torch.tensor([500.0]), cond, SIZE).shape == x.shape


def test_text_and_image_must_fit(folder: Path):
    with pytest.raises(ValueError, match=r"takes \d+ tokens: set model.max_sequence_length"):
        load(folder, tokens=8).encode([with_image(Prompt("red cat"), 0, SIZE)])


def test_another_pipeline_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds a QwenImagePipeline, which is no pipeline of Qwen-Image-Edit"):
        load(qwen_image.written(tmp_path))


def test_a_prompt_without_image_is_refused(folder: Path):
    with pytest.raises(ValueError, match="'red cat' has no image"):
        load(folder).encode([Prompt("red cat")])


def test_the_image_reaches_text_and_latents(folder: Path):
    first, second = (load(folder).encode([with_image(Prompt("red"), row, Size(16, 24))])[0] for row in (0, 1))
    assert not any(torch.equal(first[name], second[name]) for name in ("prompt_embeds", "reference"))
