import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlalign.mdp.prediction import from_network
from rlalign.types import Level

from .chains import flow_level

Kind = Literal["velocity", "epsilon", "sample", "v_prediction"]
LATENTS = [(3, 4, 4), (3, 2, 4, 4), (7, 5)]
KINDS: list[Kind] = ["velocity", "epsilon", "sample", "v_prediction"]


def draw(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network_output(kind: Kind, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """What a perfect network of that kind would say."""
    return {
        "velocity": eps - x0,
        "epsilon": eps,
        "sample": x0,
        "v_prediction": level.alpha * eps - level.sigma * x0,
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", LATENTS)
@settings(deadline=None, max_examples=20)
@given(sigma=st.floats(0.01, 0.99))
def test_every_kind_finds_the_two_ends(kind: Kind, shape: tuple[int, ...], sigma: float) -> None:
    x0, eps = draw(shape), draw(shape).flip(0)
    level = flow_level(sigma)
    if kind == "v_prediction":
        level = Level(torch.tensor(math.sqrt(1 - sigma**2), dtype=torch.float64), level.sigma, level.interior)
    x = level.alpha * x0 + level.sigma * eps
    prediction = from_network(kind, network_output(kind, x0, eps, level), x, level)
    torch.testing.assert_close(prediction.x0, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-12)
    torch.testing.assert_close(prediction.velocity, eps - x0, rtol=0, atol=1e-12)


def test_velocity_has_no_singular_level() -> None:
    x, v = draw((3,)), draw((3,)).flip(0)
    noise, data = (from_network("velocity", v, x, flow_level(sigma)) for sigma in (1.0, 0.0))
    assert torch.equal(noise.eps, x) and torch.equal(noise.x0, x - v)
    assert torch.equal(data.x0, x) and torch.equal(data.eps, x + v)


def test_errors_in_clean_latent_and_noise_follow_the_error_in_velocity() -> None:
    """|x0^ - x0|^2 = sigma^2 |v - u|^2 and |x1^ - eps|^2 = (1 - sigma)^2 |v - u|^2 at the same x (section 2)."""
    x0, eps, error = draw((6,)), draw((6,)).flip(0), draw((6,)).flip(1)
    level = flow_level(0.3)
    x = level.alpha * x0 + level.sigma * eps
    prediction = from_network("velocity", eps - x0 + error, x, level)
    torch.testing.assert_close((prediction.x0 - x0).square().sum(), 0.3**2 * error.square().sum())
    torch.testing.assert_close((prediction.eps - eps).square().sum(), 0.7**2 * error.square().sum())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_their_own_levels(kind: Kind) -> None:
    x, output = draw((3, 4)), draw((3, 4)).flip(0)
    sigmas = torch.tensor([0.2, 0.7], dtype=torch.float64)
    together = from_network(kind, output, x, flow_level(sigmas.reshape(2, 1, 1)))
    for b in range(2):
        alone = from_network(kind, output[b, None], x[b, None], flow_level(sigmas[b]))
        assert torch.equal(together.x0[b], alone.x0[0]) and torch.equal(together.eps[b], alone.eps[0])
