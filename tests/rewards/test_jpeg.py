import io

import pytest
import torch
from PIL import Image
from torch import Tensor

from rlalign.types import Prompt
from rlalign_rewards.jpeg import jpeg_compressibility, jpeg_incompressibility


def prompts(count: int) -> list[Prompt]:
    return [Prompt("anything")] * count


@pytest.fixture
def pictures() -> Tensor:
    """A flat one, a gradient, noise. uint8 [3, 3, 32, 32]"""
    flat = torch.full((3, 32, 32), 128)
    ramp = torch.arange(32).mul(8).expand(3, 32, 32)
    noise = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0))
    return torch.stack([flat, ramp, noise]).to(torch.uint8)


def test_the_size_in_kilobytes_at_quality_95(pictures: Tensor) -> None:
    file = io.BytesIO()
    Image.fromarray(pictures[2].permute(1, 2, 0).numpy()).save(file, format="JPEG", quality=95)
    sizes = jpeg_incompressibility(pictures, prompts(3))
    assert sizes[2].item() == pytest.approx(len(file.getvalue()) / 1000)
    assert torch.equal(jpeg_compressibility(pictures, prompts(3)), -sizes)


def test_noise_is_larger_than_a_gradient_and_that_than_nothing(pictures: Tensor) -> None:
    flat, ramp, noise = jpeg_incompressibility(pictures, prompts(3)).tolist()
    assert 0.6 < flat < ramp < noise < 4


def test_quality_is_an_option(pictures: Tensor) -> None:
    coarse = jpeg_incompressibility(pictures, prompts(3), quality=50)
    assert (coarse < jpeg_incompressibility(pictures, prompts(3))).tolist() == [False, True, True]  # flat is all header


def test_a_video_has_the_mean_of_its_frames(pictures: Tensor) -> None:
    sizes = jpeg_incompressibility(pictures, prompts(3))
    video = torch.stack([pictures[[0, 2]], pictures[[1, 1]]])  # [2, 2, 3, 32, 32]
    torch.testing.assert_close(
        jpeg_incompressibility(video, prompts(2)), torch.stack([(sizes[0] + sizes[2]) / 2, sizes[1]])
    )
