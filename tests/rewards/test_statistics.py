import colorsys

import pytest
import torch

from rlalign_rewards.statistics import saturation, sharpness


def test_saturation_is_that_of_hsv() -> None:
    pixels = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    expected = [sum(colorsys.rgb_to_hsv(*rgb)[1] for rgb in picture.flatten(1).T.tolist()) / 16 for picture in pixels]
    assert saturation(pixels, []).tolist() == pytest.approx(expected, abs=1e-3)
    assert saturation(torch.full((1, 3, 4, 4), 0.7), []).item() == 0


def test_sharpness_is_the_mean_square_of_the_laplacian() -> None:
    ramp = torch.linspace(0, 1, 8).expand(1, 3, 8, 8)
    assert sharpness(ramp, []).item() == pytest.approx(0, abs=1e-9)
    dot = torch.zeros(1, 3, 5, 5)
    dot[..., 2, 2] = 0.5
    assert sharpness(dot, []).item() == pytest.approx(100 * (4 * 0.5**2 + 2.0**2) / 9, rel=1e-5)
    video = dot[:, None].expand(1, 3, 3, 5, 5)
    assert sharpness(video, []).item() == pytest.approx(sharpness(dot, []).item(), rel=1e-5)


@pytest.mark.parametrize("reward", [saturation, sharpness])
def test_gradients_are_those_of_finite_differences(reward) -> None:
    images = (torch.rand(2, 3, 5, 5, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda pixels: reward(pixels, []), images)
