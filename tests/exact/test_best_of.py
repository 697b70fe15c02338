"""T8: the best of N samples of a linear-Gaussian chain: order statistics, and their KL to the policy (5.8)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.algorithms.chains import make_policy

from .riccati import through
from .training import Interval, chain_of, roll_out

LAW = {4: (1.029375, 0.636294), 8: (1.423600, 1.204442), 16: (1.765991, 1.835089)}  # mean in std, KL
GROUPS = 8000


def best(number: int, seed: int, shared: bool = False, sign: float = 1.0) -> Tensor:
    """[groups]: the best sample's qᵀy in stds of the base policy; by its reward, sign times it."""
    policy = make_policy(num_steps=4, kernel="flow_sde", noise_level=0.3)
    _, gain, variance = through(chain_of(policy))
    std = (gain.square() + variance).sqrt().item()
    generator = torch.Generator().manual_seed(seed)
    values = roll_out(policy, GROUPS, number, generator, shared).final.reshape(GROUPS, number) / std
    return values.gather(1, (sign * values).argmax(1, keepdim=True))[:, 0]


def divergence(values: Tensor, number: int) -> Tensor:
    """[groups]: log of the density N F^{N-1}, relative to the policy's, at each; its mean is the KL."""
    return torch.tensor(float(number)).log() + (number - 1) * torch.special.log_ndtr(values)


@pytest.mark.parametrize("number", LAW)
def test_the_best_of_n(number: int, seeds: tuple[int, ...], measured: Callable[..., None]):
    values = torch.cat([best(number, seed) for seed in seeds])
    mean, kl = Interval.of(values), Interval.of(divergence(values, number))
    measured(mean=mean.mean, mean_error=mean.error, kl=kl.mean, kl_error=kl.error)
    assert abs(mean.mean - LAW[number][0]) < 4 * mean.error
    assert abs(kl.mean - LAW[number][1]) < 4 * kl.error


@pytest.mark.parametrize(
    "broken", [pytest.param({"shared": True}, id="one start a group"), pytest.param({"sign": -1.0}, id="the worst")]
)
def test_a_dependent_group_or_the_worst_is_noticed(broken: dict[str, float], measured: Callable[..., None]):
    """Samples that share their start noise are alike: the best of them is nearer to the mean."""
    values = best(8, 0, **broken)  # pyright: ignore[reportArgumentType]
    mean = Interval.of(values)
    measured(mean=mean.mean, law=LAW[8][0], error=mean.error)
    assert abs(mean.mean - LAW[8][0]) > 20 * mean.error
