import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlalign.mdp.schedule import (
    compressed_tail_sigmas,
    ddim_schedule,
    diffusers_dynamic_sigmas,
    diffusers_static_sigmas,
    dynamic_mu,
    exponential_hold,
    flow_schedule,
    linear_hold,
    moving_window,
    plain_sigmas,
    scaled_linear_alphas_cumprod,
    shift,
    stretch_terminal,
)
from rlalign.mdp.transition import ddim

GOLDEN = {  # SPEC_KERNELS 16.1
    "static": (
        diffusers_static_sigmas(10, 3.0),
        "1 0.960129 0.913349 0.857692 0.790368 0.707278 0.602151 0.464876 0.278049 0.008929 0",
    ),
    "plain": (
        plain_sigmas(10, 3.0),
        "1 0.964286 0.923077 0.875000 0.818182 0.750000 0.666667 0.562500 0.428571 0.250000 0",
    ),
    "flux 512": (diffusers_dynamic_sigmas(6, 0.63), "1 0.903736 0.789705 0.652489 0.484218 0.273003 0"),
    "flux 1024": (diffusers_dynamic_sigmas(6, 1.15), "1 0.940444 0.863320 0.759511 0.612267 0.387119 0"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_grids(name: str) -> None:
    sigmas, expected = GOLDEN[name]
    numbers = torch.tensor([float(n) for n in expected.split()], dtype=torch.float64)
    torch.testing.assert_close(sigmas, numbers, rtol=0, atol=5e-7)


@settings(deadline=None, max_examples=25)
@given(num_steps=st.integers(1, 60), s=st.floats(0.2, 12))
def test_grids_fall_from_one_to_zero(num_steps: int, s: float) -> None:
    for sigmas in (
        plain_sigmas(num_steps, s),
        diffusers_static_sigmas(num_steps, s),
        diffusers_dynamic_sigmas(num_steps, math.log(s)),
    ):
        assert sigmas.shape == (num_steps + 1,) and sigmas.dtype == torch.float64
        torch.testing.assert_close(sigmas[0], torch.ones_like(sigmas[0]))
        assert sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_dynamic_shift_is_the_static_shift_with_e_to_the_mu() -> None:
    u = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    dynamic = math.exp(0.8) / (math.exp(0.8) + (1 / u - 1))
    torch.testing.assert_close(shift(u, math.exp(0.8)), dynamic)
    assert torch.equal(shift(u, 1.0), u)


@pytest.mark.parametrize("num_steps", [4, 10, 28])
def test_static_grid_shifts_its_last_level_twice(num_steps: int) -> None:
    assert diffusers_static_sigmas(num_steps, 3.0)[-2].item() == pytest.approx(0.008929, abs=5e-7)


def test_dynamic_mu_of_flux() -> None:
    assert dynamic_mu(1024) == pytest.approx(0.63)
    assert dynamic_mu(4096) == pytest.approx(1.15)
    assert dynamic_mu(256) == pytest.approx(0.5)


def test_stretched_grid_ends_where_told() -> None:
    sigmas = stretch_terminal(diffusers_dynamic_sigmas(8, 0.7), 0.02)
    assert sigmas[0] == 1 and sigmas[-1] == 0
    assert sigmas[-2].item() == pytest.approx(0.02)


def test_flow_schedule_keeps_alpha_plus_sigma_one() -> None:
    schedule = flow_schedule(plain_sigmas(12, 3.0))
    assert schedule.sigma.dtype == schedule.alpha.dtype == schedule.time.dtype == torch.float32
    assert torch.equal(schedule.alpha, 1 - schedule.sigma)
    assert torch.equal(schedule.time, 1000 * schedule.sigma)
    assert flow_schedule(plain_sigmas(12, 3.0), torch.float64).sigma.dtype == torch.float64


def test_stable_diffusion_table() -> None:
    table = scaled_linear_alphas_cumprod()
    for index, value in {0: 0.99915, 1: 0.998296, 500: 0.276333, 981: 0.00577550, 999: 0.00466010}.items():
        assert table[index].item() == pytest.approx(value, rel=2e-6)


def test_ddim_times_and_edge_stds() -> None:
    schedule = ddim_schedule(50, scaled_linear_alphas_cumprod(), dtype=torch.float64)
    assert schedule.num_steps == 50
    assert schedule.time.tolist() == [*range(981, 0, -20), 0]
    torch.testing.assert_close(schedule.alpha.square() + schedule.sigma.square(), torch.ones(51, dtype=torch.float64))
    assert _std(schedule.alpha, schedule.sigma, 0) == pytest.approx(0.454463, abs=5e-7)
    assert _std(schedule.alpha, schedule.sigma, 49) == pytest.approx(0.020648, abs=5e-7)


def _std(alpha: Tensor, sigma: Tensor, k: int) -> float:
    from rlalign.mdp.prediction import Prediction
    from rlalign.types import Level

    now, nxt = Level(alpha[k], sigma[k], sigma[1]), Level(alpha[k + 1], sigma[k + 1], sigma[1])
    x = torch.zeros(1, 1, dtype=torch.float64)
    return ddim(x, Prediction(x, x), now, nxt, 1.0).std.item()


def test_compressed_tail_keeps_the_head_and_reaches_zero() -> None:
    sigmas = compressed_tail_sigmas(25, 3.0, last=7, ratio=0.4)
    assert torch.equal(sigmas[:8], plain_sigmas(25, 3.0)[:8])
    assert len(sigmas) == 8 + int(18 * 0.4)
    assert sigmas[-1] == 0 and (sigmas.diff() < 0).all()


@pytest.mark.parametrize("ratio", [0.05, 0.1])
def test_compressed_tail_of_one_point_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="never reaches sigma 0"):
        compressed_tail_sigmas(25, 3.0, last=7, ratio=ratio)


def test_moving_window_progresses_rolls_back_or_stops() -> None:
    def starts(roll_back: bool) -> list[range]:
        return [moving_window(i, 2, 5, 2, lambda _: 2, roll_back) for i in range(10)]

    climb = [range(0, 2)] * 2 + [range(2, 4)] * 2 + [range(4, 5)] * 2
    assert starts(roll_back=True) == climb + climb[:4]
    assert starts(roll_back=False) == climb + [range(4, 5)] * 4


def test_moving_window_stays_longer_at_high_noise() -> None:
    decay, exponential = linear_hold(25, 6, 20), exponential_hold(25)
    assert [decay(0), decay(10), decay(20)] == [25, 15, 6]
    assert [exponential(0), exponential(13), exponential(23)] == [25, 25, math.ceil(25 / math.e)]
    assert moving_window(24, 4, 20, 1, decay).start == 0
    assert moving_window(25, 4, 20, 1, decay).start == 1
