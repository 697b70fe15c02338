"""Exact velocities against autograd on the density, and golden gains of a whole chain (EXACT_TESTS 3.2)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from rlalign.models.analytic import Config, Family, numbers
from rlalign.models.lora import full
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Prompt, Size

CORRELATED: dict[str, Any] = {
    "means": [[1.0, -2.0], [-1.0, 0.5], [0.0, 3.0]],
    "covariances": [[[1.0, 0.6], [0.6, 0.5]], [[0.2, 0.0], [0.0, 2.0]], [[1.0, -0.9], [-0.9, 1.0]]],
    "weights": [0.5, 0.3, 0.2],
    "prompt_weights": {"left": [0.0, 1.0, 0.0]},
}


def load(path: str = "", dtype: torch.dtype = torch.float64, **config: Any) -> Family:
    return Family.load(Config(**config), path, dtype, "cpu")


def test_velocity_is_that_of_the_density():
    """x1 = x + (1 - t) v and score = -x1/t, with the score of sum_i w_i N((1-t) m_i, (1-t)^2 S_i + t^2 I)."""
    family = load(**CORRELATED)
    names = ("means", "covariances", "weights")
    means, covariances, weights = (torch.tensor(CORRELATED[name], dtype=torch.float64) for name in names)
    x = 2 * torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cond, _ = family.encode([Prompt("anything")])
    for t in (0.02, 0.3, 0.8, 1.0):
        noised = (1 - t) ** 2 * covariances + t**2 * torch.eye(2, dtype=torch.float64)
        density = MixtureSameFamily(Categorical(weights), MultivariateNormal((1 - t) * means, noised))
        at = x.clone().requires_grad_()
        (score,) = torch.autograd.grad(density.log_prob(at).sum(), at)
        time = torch.full((7,), 1000 * t, dtype=torch.float64)
        rows = {name: value.expand(7, -1) for name, value in cond.items()}
        velocity = family.predict(x.reshape(7, 1, 1, 2), time, rows, Size(1, 2)).reshape(7, 2)
        torch.testing.assert_close(x + (1 - t) * velocity, -t * score, rtol=1e-9, atol=1e-9)


def test_a_prompt_chooses_components():
    family = load(**CORRELATED)
    cond, uncond = family.encode([Prompt("left"), Prompt("all", negative="left")])
    assert uncond is not None
    torch.testing.assert_close(cond["log_weights"][0], uncond["log_weights"][1])
    torch.testing.assert_close(cond["log_weights"][1].exp(), torch.tensor([0.5, 0.3, 0.2]).double())
    alone = load(means=[[-1.0, 0.5]], stds=[[0.2**0.5, 2.0**0.5]])
    x, time = torch.tensor([[[[0.3, 0.1]]]], dtype=torch.float64), torch.tensor([500.0])
    one = alone.predict(x, time, alone.encode([Prompt("")])[0], Size(1, 2))
    torch.testing.assert_close(family.predict(x, time, {"log_weights": cond["log_weights"][:1]}, Size(1, 2)), one)


@pytest.mark.parametrize(
    ("kernel", "noise_level", "last_step", "gain", "variance"),
    [
        ("flow_sde", 0.0, "ode", 0.833024, 0.0),
        ("flow_sde", 0.7, "ode", 0.190203, 0.767308),
        ("flow_sde", 0.7, "sde_untrained", 0.185025, 0.766934),
        ("dance_sde", 0.3, "ode", 0.786489, 0.083377),
        ("cps", 0.7, "ode", 0.003866, 0.515602),
        ("ddim", 0.5, "ode", 0.423933, 0.486399),
    ],
)
def test_golden_chain(kernel: Any, noise_level: float, last_step: Any, gain: float, variance: float):
    """One-dimensional N(0, 1), plain grid, shift 3, N = 10: y_N = F y_0 + sum_k g_k w_k is linear, V = sum g_k^2."""
    settings = RolloutConfig(size=(1, 1), num_steps=10, kernel=kernel, noise_level=noise_level, last_step=last_step)
    policy = analytic_policy(load(), settings)
    impulses = torch.eye(11, dtype=torch.float64).reshape(11, 11, 1, 1, 1)  # row 0: y_0 = 1; row k + 1: w_k = 1
    stochastic = torch.ones(11, 10, dtype=torch.bool)
    stochastic[:, -1] = last_step != "ode"
    if noise_level == 0:
        stochastic[:] = False
    cond = {name: value.expand(11, -1) for name, value in policy.family.encode([Prompt("")])[0].items()}
    chain = policy.roll_out(
        impulses[:, 0],
        cond,
        None,
        policy.schedule(settings),
        stochastic,
        torch.zeros(11, 0, dtype=torch.int64),
        lambda k: impulses[:, k + 1],
        settings,
    )
    final = chain.final.flatten()
    assert float(final[0]) == pytest.approx(gain, abs=1e-6)
    assert float(final[1:].square().sum()) == pytest.approx(variance, abs=1e-6)


def analytic_policy(family: Family, settings: RolloutConfig) -> Policy:
    return Policy(family, settings, full(family.nets, ["velocity"]), lora=False)


def test_residual_is_affine_and_belongs_to_its_knot():
    family = load(means=[[0.0, 0.0]], knots=[0.9, 0.2])
    x, cond = torch.randn(2, 1, 1, 2, dtype=torch.float64), family.encode([Prompt(""), Prompt("")])[0]

    def velocity(t: float) -> Tensor:
        return family.predict(x, torch.full((2,), 1000 * t), cond, Size(1, 2)).flatten(1)

    base = [velocity(t) for t in (0.95, 0.6, 0.5, 0.0)]
    with torch.no_grad():
        family.net.residual.weight[:, :3] = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 0.25]])  # knot 0.9: x, y, 1
    moved = [velocity(t) for t in (0.95, 0.6, 0.5, 0.0)]
    u, v = x.flatten(1).T
    residual = torch.stack([u + 2 * v + 0.5, -v + 0.25], 1)
    for before, after, expected in zip(base, moved, (residual, residual, 0, 0), strict=True):
        torch.testing.assert_close(after - before, torch.zeros_like(before) + expected)


@pytest.mark.parametrize("shape", [None, (6,), (3, 2), (2, 1, 1, 3)])
def test_latents_of_any_shape(shape: tuple[int, ...] | None):
    family = load(means=[[0.1 * i for i in range(6)]], shape=shape)
    latent_shape = family.latent_shape(Size(2, 3))
    x = torch.randn(4, *latent_shape, dtype=torch.float64)
    cond = {name: value.expand(4, -1) for name, value in family.encode([Prompt("")])[0].items()}
    assert family.predict(x, torch.full((4,), 300.0), cond, Size(2, 3)).shape == x.shape
    pixels = family.decode(x, Size(2, 3))
    assert pixels.shape == (4, 3, 2, 3)
    torch.testing.assert_close(numbers(pixels), x.flatten(1))
    torch.testing.assert_close(family.encode_images(pixels, Size(2, 3)), x)
    torch.testing.assert_close(numbers(pixels.mul(255).round().to(torch.uint8)), x.flatten(1), atol=0.02, rtol=0)


def test_videos():
    family = load(means=[[0.0] * 12], shape=(1, 3, 2, 2))
    size = Size(2, 2, frames=3)
    x = torch.randn(4, *family.latent_shape(size), dtype=torch.float64)
    pixels = family.decode(x, size)
    assert pixels.shape == (4, 3, 3, 2, 2)
    torch.testing.assert_close(numbers(pixels), x.flatten(1))


def test_saved_and_loaded(tmp_path: Path):
    family = load(**CORRELATED)
    torch.nn.init.normal_(family.net.residual.weight)
    family.save_pipeline(tmp_path)
    again = load(str(tmp_path), **CORRELATED)
    assert all(torch.equal(again.net.state_dict()[name], value) for name, value in family.net.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        {"means": [[0.0, 1.0], [1.0]]},
        {"stds": [[1.0, 1.0]]},
        {"stds": [[0.0]]},
        {"covariances": [[[1.0, 2.0], [2.0, 1.0]]], "means": [[0.0, 0.0]]},
        {"weights": [0.5, 0.5]},
        {"prompt_weights": {"a": [1.0, 2.0]}},
    ],
)
def test_impossible_data_is_refused(config: dict[str, Any]):
    with pytest.raises(ValueError):
        load(**config)


def test_policies_of_analytic_data_need_no_diffusers():
    code = "import rlalign.models.analytic, rlalign.policy, sys; assert not {'diffusers', 'peft'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
