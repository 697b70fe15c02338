import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from rlalign.mdp.prediction import Prediction, from_network
from rlalign.mdp.schedule import diffusers_static_sigmas, flow_schedule, plain_sigmas
from rlalign.mdp.transition import KERNELS, Gaussian, cps, dance_sde, ddim, flow_sde, precise, unscaled_log_prob
from rlalign.types import Level, Schedule

from .chains import flow_level

LATENTS = [(3, 4, 4), (3, 2, 4, 4), (7, 5)]
NOISE_LEVELS = {"dance_sde": 0.3, "ddim": 0.8, "precise": 0.9}
sigmas = st.tuples(st.floats(0.02, 0.98), st.floats(0.0, 0.95)).map(lambda ends: (ends[0], ends[0] * ends[1]))


def scalar_step(name: str, noise_level: float, v: float = -0.3) -> Gaussian:
    """x = 0.5, sigma = 0.8 -> 0.7 on the flow path (SPEC_KERNELS 16.2)."""
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    now, nxt = flow_level(0.8), flow_level(0.7)
    return KERNELS[name](x, from_network("velocity", torch.full_like(x, v), x, now), now, nxt, noise_level)


@pytest.mark.parametrize(
    ("name", "noise_level", "mean", "std", "log_prob"),
    [
        ("ode", 0.0, 0.53, 0.0, None),
        ("flow_sde", 0.7, 0.4761, 0.442718872, -0.118049881),
        ("dance_sde", 0.3, 0.527525, 0.094868330, 1.408264283),
        ("cps", 0.7, 0.361829074, 0.623704567, -0.492371146),
        ("ddim", 1.0, 0.401666667, 0.568563003, -0.388327609),
        ("ddpm", 0.0, 0.401666667, 0.568563003, -0.388327609),
        ("precise", math.sqrt(2), 0.401666667, 0.568563003, -0.388327609),
        ("ddim", 0.5, 0.503456973, 0.284281502, 0.325449412),
        ("precise", 1.0, 0.457238886, 0.451848057, -0.145601770),
    ],
)
def test_golden_step(name: str, noise_level: float, mean: float, std: float, log_prob: float | None) -> None:
    gaussian = scalar_step(name, noise_level)
    assert gaussian.mean.item() == pytest.approx(mean, abs=6e-10)
    assert gaussian.std.item() == pytest.approx(std, abs=6e-10)
    if log_prob is not None:
        x_next = torch.full((1, 1), 0.55, dtype=torch.float64)
        assert gaussian.log_prob(x_next, "sum").item() == pytest.approx(log_prob, abs=6e-10)


def test_golden_unscaled_cps() -> None:
    x_next = torch.full((1, 1), 0.55, dtype=torch.float64)
    assert unscaled_log_prob(scalar_step("cps", 0.7), x_next).item() == pytest.approx(-0.035408297, abs=6e-10)


def test_golden_divergence() -> None:
    gaussian, reference = scalar_step("flow_sde", 0.7), scalar_step("flow_sde", 0.7, v=-0.2)
    assert gaussian.kl(reference, "mean").item() == pytest.approx(3.954145408e-4, rel=1e-9)
    assert gaussian.kl(reference, "mean").item() * 0.1 == pytest.approx(3.954145408e-5, rel=1e-9)  # no_tau


def test_golden_vp_step() -> None:
    levels = [
        Level(torch.tensor(a).double().sqrt(), torch.tensor(1 - a).double().sqrt(), torch.ones(()))
        for a in (0.25, 0.36)
    ]
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    prediction = from_network("epsilon", torch.full_like(x, 0.2), x, levels[0])
    gaussian = ddim(x, prediction, levels[0], levels[1], 1.0)
    assert prediction.x0.item() == pytest.approx(0.653589838, abs=2e-8)
    assert gaussian.std.item() == pytest.approx(0.510627791, abs=2e-8)
    assert gaussian.mean.item() == pytest.approx(0.515321960, abs=2e-8)


GOLDEN_16_3 = """
1.0000 3.5057 0.7000 0.07956 0.0570
0.9601 3.4351 0.7430 0.10953 0.0784
0.9133 2.2726 0.5362 0.04228 0.1292
0.8577 1.7185 0.4459 0.02904 0.1880
0.7904 1.3592 0.3918 0.02557 0.2640
0.7073 1.0881 0.3528 0.02624 0.3710
0.6022 0.8612 0.3191 0.03036 0.5356
0.4649 0.6524 0.2820 0.03928 0.8248
0.2780 0.4344 0.2254 0.05750 1.4867
0.0089 0.0664 0.0063 0.00004 1.7706
"""


@pytest.mark.parametrize("k", range(10))
def test_golden_flow_sde_steps(k: int) -> None:
    """Level, s, std, oracle excess variance and gradient scale of every step (SPEC_KERNELS 16.3, 9a and 12)."""
    sigma, s, std, excess, scale = map(float, GOLDEN_16_3.split("\n")[k + 1].split())
    schedule = flow_schedule(diffusers_static_sigmas(10, 3.0), torch.float64)
    oracle = torch.zeros(1, 1, dtype=torch.float64)  # x0 = 0 and eps = 1, known exactly
    now, nxt = schedule.level(k, oracle), schedule.level(k + 1, oracle)
    gaussian = flow_sde(now.sigma + oracle, Prediction(oracle, oracle + 1), now, nxt, 0.7)
    tau = (now.sigma - nxt.sigma).item()
    assert now.sigma.item() == pytest.approx(sigma, abs=6e-5)
    assert gaussian.std.item() / math.sqrt(tau) == pytest.approx(s, abs=6e-5)
    assert gaussian.std.item() == pytest.approx(std, abs=6e-5)
    assert _noise_variance(gaussian) - nxt.sigma.item() ** 2 == pytest.approx(excess, abs=6e-6)
    assert _gradient_scale(gaussian.std.item(), now, nxt) == pytest.approx(scale, abs=6e-5)


def _noise_variance(gaussian: Gaussian) -> float:
    """Variance of the noise in x' when x0 = 0 and eps = 1 were predicted exactly from x = sigma."""
    return (gaussian.mean.square() + gaussian.std.square()).item()


def _gradient_scale(std: float, now: Level, nxt: Level) -> float:
    """gamma in d log p/d v = -(gamma/D) z, by differentiating."""
    x, z = torch.tensor([[0.3, -1.0]], dtype=torch.float64), torch.tensor([[0.7, -1.3]], dtype=torch.float64)
    v = torch.tensor([[0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    gaussian = flow_sde(x, from_network("velocity", v, x, now), now, nxt, 0.7)
    gaussian.log_prob(gaussian.sample(z), "mean").sum().backward()
    assert v.grad is not None
    scales = -v.grad * 2 / z
    torch.testing.assert_close(scales[0, 0], scales[0, 1])
    return scales[0, 0].item()


# Spellings of the papers and of public code


def random_step(
    name: str, noise_level: float, ends: tuple[float, float]
) -> tuple[Gaussian, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 2, 6, dtype=torch.float64, generator=generator)
    now, nxt = flow_level(ends[0]), flow_level(ends[1])
    return KERNELS[name](x, from_network("velocity", v, x, now), now, nxt, noise_level), x, v, now.sigma, nxt.sigma


def same(gaussian: Gaussian, mean: Tensor, std: Tensor) -> None:
    torch.testing.assert_close(gaussian.mean, mean, rtol=0, atol=1e-11)
    torch.testing.assert_close(gaussian.std, std, rtol=0, atol=1e-11)


@settings(deadline=None, max_examples=30)
@given(ends=sigmas, a=st.floats(0.01, 2.0))
def test_flow_sde_as_public_code_expands_it(ends: tuple[float, float], a: float) -> None:
    gaussian, x, v, sigma, after = random_step("flow_sde", a, ends)
    s, dt = a * (sigma / (1 - sigma)).sqrt(), after - sigma
    mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    torch.testing.assert_close(gaussian.mean, mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gaussian.std, s * (-dt).sqrt())


@settings(deadline=None, max_examples=30)
@given(ends=sigmas, eta=st.floats(0.01, 1.5))
def test_dance_sde_in_its_score_form(ends: tuple[float, float], eta: float) -> None:
    gaussian, x, v, sigma, after = random_step("dance_sde", eta, ends)
    dt, x0 = after - sigma, x - sigma * v
    mean = x + v * dt + 0.5 * eta**2 * (x - (1 - sigma) * x0) / sigma**2 * dt
    torch.testing.assert_close(gaussian.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gaussian.std, eta * (-dt).sqrt())


@settings(deadline=None, max_examples=30)
@given(ends=sigmas, a=st.floats(0.0, 1.0))
def test_cps_by_its_radicand(ends: tuple[float, float], a: float) -> None:
    gaussian, x, v, sigma, after = random_step("cps", a, ends)
    std = after * math.sin(a * math.pi / 2)
    mean = (1 - after) * (x - sigma * v) + (after**2 - std**2).clamp(min=0).sqrt() * (x + (1 - sigma) * v)
    torch.testing.assert_close(gaussian.mean, mean, rtol=0, atol=1e-7)  # the radicand rounds, the cosine does not
    torch.testing.assert_close(gaussian.std, std, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(ends=sigmas, eta=st.floats(0.0, 1.0))
def test_ddim_in_published_spellings(ends: tuple[float, float], eta: float) -> None:
    gaussian, _, _, sigma, after = random_step("ddim", eta, ends)
    flow = eta * after * (1 - after**2 * (1 - sigma) ** 2 / (sigma**2 * (1 - after) ** 2)).sqrt()
    torch.testing.assert_close(gaussian.std, flow, rtol=0, atol=1e-11)
    x = torch.zeros(1, 1, dtype=torch.float64)
    abar = [torch.tensor(1 - end, dtype=torch.float64) for end in ends]
    now, nxt = (Level(a.sqrt(), (1 - a).sqrt(), torch.ones(())) for a in abar)
    variance = (1 - abar[1]) / (1 - abar[0]) * (1 - abar[0] / abar[1])
    std = ddim(x, Prediction(x, x), now, nxt, eta).std
    torch.testing.assert_close(std, eta * variance.sqrt(), rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=30)
@given(ends=sigmas)
def test_members_of_one_family_agree(ends: tuple[float, float]) -> None:
    ddpm = random_step("ddpm", 0.0, ends)[0]
    for name, noise_level in (("ddim", 1.0), ("precise", math.sqrt(2))):
        same(random_step(name, noise_level, ends)[0], ddpm.mean, ddpm.std)
    ode, x, v, sigma, after = random_step("ode", 0.0, ends)
    for name in ("ddim", "cps", "precise", "flow_sde", "dance_sde"):
        same(random_step(name, 0.0, ends)[0], ode.mean, ode.std)
    same(ode, x - (sigma - after) * v, torch.zeros_like(after))
    root = random_step("flow_sde", math.sqrt(2), ends)[0]
    same(random_step("memoryless", 0.0, ends)[0], root.mean, root.std)
    flash = random_step("dance_sde", 0.95 * ends[0], ends)[0]
    same(random_step("flash_sde", 0.0, ends)[0], flash.mean, flash.std)


@settings(deadline=None, max_examples=30)
@given(ends=sigmas, level=st.floats(0.05, 1.0))
def test_oracle_noise_variance(ends: tuple[float, float], level: float) -> None:
    """Marginal-preserving steps keep sigma'^2; the SDE steps leave (s^2 tau^2/sigma)(1 + s^2/(4 sigma)) more (9a)."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    now, nxt = flow_level(ends[0]), flow_level(ends[1])
    for name in ("cps", "ddim", "ddpm", "precise", "ode"):
        gaussian = KERNELS[name](now.sigma + zero, Prediction(zero, zero + 1), now, nxt, level)
        assert _noise_variance(gaussian) == pytest.approx(ends[1] ** 2, abs=1e-12)
    gaussian = dance_sde(now.sigma + zero, Prediction(zero, zero + 1), now, nxt, level)
    tau = ends[0] - ends[1]
    excess = level**2 * tau**2 / ends[0] * (1 + level**2 / (4 * ends[0]))
    assert _noise_variance(gaussian) - ends[1] ** 2 == pytest.approx(excess, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("grid", [plain_sigmas(7, 3.0), diffusers_static_sigmas(10, 3.0), plain_sigmas(25, 1.0)])
def test_first_flow_sde_step_has_std_a_on_every_grid(grid: Tensor) -> None:
    schedule = flow_schedule(grid, torch.float64)
    x = torch.ones(1, 1, dtype=torch.float64)
    gaussian = flow_sde(x, Prediction(x, x), schedule.level(0, x), schedule.level(1, x), 0.7)
    assert gaussian.std.item() == pytest.approx(0.7, abs=1e-12)


def test_first_ancestral_step_forgets_x() -> None:
    x, now, nxt = torch.ones(1, 3, dtype=torch.float64), flow_level(1.0), flow_level(0.9)
    gaussian = KERNELS["ddpm"](x, from_network("velocity", x / 2, x, now), now, nxt, 0.0)
    same(gaussian, nxt.alpha * (x - x / 2), nxt.sigma)


# Shapes, rows and precision


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("shape", LATENTS)
def test_rows_at_their_own_steps(name: str, shape: tuple[int, ...]) -> None:
    """Bitwise: a row gives the same numbers alone with scalar levels, in any batch with row levels, at any place."""
    schedule = flow_schedule(plain_sigmas(8, 3.0))
    x, v = torch.randn(2, 13, *shape, generator=torch.Generator().manual_seed(2))
    steps = torch.tensor([0, 3, 6, 1, 0, 5, 2, 4, 0, 3, 6, 2, 1])
    together = _mean_std_density(name, schedule, steps, x, v)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(3))[:9]
    for moved, original in zip(
        _mean_std_density(name, schedule, steps[order], x[order], v[order]), together, strict=True
    ):
        assert torch.equal(moved, original[order])
    for b in range(13):
        alone = _mean_std_density(name, schedule, int(steps[b]), x[b, None], v[b, None])
        assert all(torch.equal(one[0], all_[b]) for one, all_ in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_the_last_bit_does_not_know_the_place_in_the_batch(name: str) -> None:
    """Functions like pow differ between a vector's body and tail: every level of a long grid, alone and together."""
    schedule, steps = flow_schedule(plain_sigmas(203, 3.0)), torch.arange(202)
    x, v = torch.randn(2, 202, 1, generator=torch.Generator().manual_seed(8))
    together = _mean_std_density(name, schedule, steps, x, v)
    alone = [_mean_std_density(name, schedule, k, x[k, None], v[k, None]) for k in range(202)]
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))


def _mean_std_density(
    name: str, schedule: Schedule, step: int | Tensor, x: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    now, nxt = schedule.level(step, x), schedule.level(step + 1, x)
    gaussian = KERNELS[name](x, from_network("velocity", v, x, now), now, nxt, NOISE_LEVELS.get(name, 0.7))
    assert gaussian.mean.shape == x.shape
    density = unscaled_log_prob(gaussian, v) if name == "ode" else gaussian.log_prob(v, "mean")
    return gaussian.mean, gaussian.std.expand(len(x), *[1] * (x.ndim - 1)), density


@pytest.mark.parametrize("name", ["flow_sde", "dance_sde", "cps", "ddim", "precise"])
def test_noise_level_of_each_row(name: str) -> None:
    x, v = torch.randn(2, 3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    now, nxt = flow_level(0.8), flow_level(0.6)
    levels = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    together = KERNELS[name](x, from_network("velocity", v, x, now), now, nxt, levels.reshape(3, 1, 1))
    for b in range(3):
        prediction = from_network("velocity", v[b, None], x[b, None], now)
        alone = KERNELS[name](x[b, None], prediction, now, nxt, levels[b].item())
        torch.testing.assert_close(together.mean[b], alone.mean[0])
        torch.testing.assert_close(together.std[b].flatten(), alone.std.flatten())


@pytest.mark.parametrize("name", [name for name in KERNELS if name != "ode"])
def test_float32_against_float64(name: str) -> None:
    """Prints the gap in mean and log-probability; latents of 1024 numbers, every step of a ten-step grid."""
    x, v, z = torch.randn(3, 4, 1024, generator=torch.Generator().manual_seed(5))
    gap_mean = gap_density = 0.0
    for k in range(9):
        single = _step(name, x, v, k, torch.float32)
        double = _step(name, x.double(), v.double(), k, torch.float64)
        x_next = single.sample(z)
        gap_mean = max(gap_mean, (single.mean - double.mean).abs().max().item())
        difference = single.log_prob(x_next, "mean") - double.log_prob(x_next.double(), "mean")
        gap_density = max(gap_density, difference.abs().max().item())
    print(f"{name}: float32 against float64, mean {gap_mean:.1e}, mean log-probability {gap_density:.1e}")
    assert gap_mean < 1e-5 and gap_density < 1e-4


def _step(name: str, x: Tensor, v: Tensor, k: int, dtype: torch.dtype) -> Gaussian:
    schedule = flow_schedule(plain_sigmas(10, 3.0).float(), dtype)
    now, nxt = schedule.level(k, x), schedule.level(k + 1, x)
    return KERNELS[name](x, from_network("velocity", v, x, now), now, nxt, NOISE_LEVELS.get(name, 0.7))


@pytest.mark.parametrize("name", KERNELS)
def test_moments_of_a_million_draws(name: str) -> None:
    gaussian = scalar_step(name, NOISE_LEVELS.get(name, 0.7))
    draws = gaussian.sample(torch.randn(1_000_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(6)))
    mean, std = gaussian.mean.item(), gaussian.std.item()
    assert draws.mean().item() == pytest.approx(mean, abs=4 * std / 1000 + 1e-12)
    assert draws.std().item() == pytest.approx(std, abs=4 * std / math.sqrt(2e6) + 1e-12)


# Densities and divergences


def some_gaussians(shape: tuple[int, ...]) -> tuple[Gaussian, Gaussian, Tensor]:
    generator = torch.Generator().manual_seed(7)
    one, other, x = torch.randn(3, 2, *shape, dtype=torch.float64, generator=generator)
    stds = torch.tensor([0.3, 1.7], dtype=torch.float64).reshape(2, *[1] * len(shape))
    return Gaussian(one, stds), Gaussian(other, stds.flip(0)), x


@pytest.mark.parametrize("shape", LATENTS)
def test_log_prob_and_kl_against_torch(shape: tuple[int, ...]) -> None:
    one, other, x = some_gaussians(shape)
    normals = [Normal(g.mean, g.std.expand_as(g.mean)) for g in (one, other)]
    torch.testing.assert_close(one.log_prob(x, "sum"), normals[0].log_prob(x).flatten(1).sum(1))
    torch.testing.assert_close(one.log_prob(x, "mean"), one.log_prob(x, "sum") / math.prod(shape))
    torch.testing.assert_close(one.kl(other, "sum"), kl_divergence(*normals).flatten(1).sum(1))
    torch.testing.assert_close(one.kl(other, "mean"), one.kl(other, "sum") / math.prod(shape))


def test_kl_with_equal_std_is_the_scaled_square_and_zero_at_home() -> None:
    one, other, _ = some_gaussians((3, 4))
    other = Gaussian(other.mean, one.std)
    expected = ((one.mean - other.mean).square() / (2 * one.std.square())).flatten(1).sum(1)
    assert torch.equal(one.kl(other, "sum"), expected)
    assert torch.equal(one.kl(one, "mean"), torch.zeros(2, dtype=torch.float64))


def test_a_sample_is_data_for_the_density() -> None:
    mean = torch.zeros(2, 3, requires_grad=True)
    x = torch.ones(2, 3, requires_grad=True)
    for density in (Gaussian(mean, torch.tensor(0.5)).log_prob, lambda x, _: unscaled_log_prob(Gaussian(mean, x), x)):
        (gradient,) = torch.autograd.grad(density(x, "sum").sum(), x, allow_unused=True)
        assert gradient is None


@pytest.mark.parametrize("std", [torch.tensor(0.0), torch.tensor([[1.0], [0.0]])])
def test_no_noise_no_density(std: Tensor) -> None:
    still, moving, x = (
        Gaussian(torch.zeros(2, 3), std),
        Gaussian(torch.zeros(2, 3), torch.tensor(1.0)),
        torch.ones(2, 3),
    )
    refusals: list[Callable[[], Tensor]] = [
        lambda: still.log_prob(x, "mean"),
        lambda: still.kl(moving, "mean"),
        lambda: moving.kl(still, "mean"),
    ]
    for refusal in refusals:
        with pytest.raises(ValueError, match="without noise"):
            refusal()


@pytest.mark.parametrize("name", ["cps", "ddim", "ddpm", "precise", "ode"])
def test_last_step_of_marginal_preserving_kernels_has_no_noise(name: str) -> None:
    x = torch.ones(1, 2, dtype=torch.float64)
    now, nxt = flow_level(0.25), flow_level(0.0)
    prediction = from_network("velocity", x / 3, x, now)
    same(KERNELS[name](x, prediction, now, nxt, 0.8), prediction.x0, torch.zeros((), dtype=torch.float64))


def test_radicands_are_clamped() -> None:
    """eta = 1 at zero terminal signal (alpha = 0) and a = 1 leave radicands that may round below 0."""
    x = torch.ones(1, 2)
    for sigma in torch.linspace(0.01, 0.99, 99).tolist():
        now, nxt = flow_level(1.0, dtype=torch.float32), flow_level(sigma, dtype=torch.float32)
        for gaussian in (ddim(x, Prediction(x, x), now, nxt, 1.0), cps(x, Prediction(x, x), now, nxt, 1.0)):
            assert gaussian.mean.isfinite().all() and gaussian.std.isfinite().all()
        assert precise(x, Prediction(x, x), now, nxt, 0.0).std == 0
