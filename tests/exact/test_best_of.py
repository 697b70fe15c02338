"""T8: the best of N samples of a linear-Gaussian chain: order statistics, and their KL to the policy (5.8).

RAFT, fitted to the samples of the reference all the way, has the velocity of their law

    p N F(r)^(N - 1)        v = E[u | x_t] under it

on the mixture and in the table of grid.py; its own samples have the mean of F that the law says, N / (N + 1), as far as
the solver of twelve steps goes: so they are compared with those of the exact velocity under the same solver.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlalign.algorithms import raft
from tests.algorithms.chains import make_policy

from .conftest import Proof
from .grid import LEVELS, REFERENCE, Array, Given, Plan, distance, fresh, samples, trained
from .regressions import NOTHING
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


# --- RAFT

BASE: Array = samples(NOTHING)  # quantiles of the policy's own law: in order, since the solver keeps it
RANKS: Array = (np.arange(len(BASE)) + 0.5) / len(BASE)
CLOSE = 0.05


def order_statistic(best: int, number: int) -> Array:
    """[n] density of F(r) relative to the policy's, mean of the ``best`` largest of ``number``."""
    ranked = [
        number * math.comb(number - 1, k) * RANKS ** (number - 1 - k) * (1 - RANKS) ** k for k in range(best)
    ]  # of the k + 1st largest
    return sum(ranked, np.zeros_like(RANKS)) / best


def law(number: int, best: int = 1) -> tuple[Array, Array]:
    """[N, X] δ of the law of the best, and density of its x_t."""
    shares = order_statistic(best, number)
    given, kernel = Given(BASE, BASE), np.exp(Given(BASE, BASE).kernel)
    weighted = kernel * shares
    density = weighted.sum(2)
    mean = (weighted * given.u).sum(2) / density
    return mean - REFERENCE, density / density.sum(1, keepdims=True)


def fitted(number: int, seed: int, steps: int = 24, **config: Any) -> Array:
    keep = config.get("keep", 1)
    settings: dict[str, Any] = {"num_times": LEVELS, "times": "grid", "weighting": "uniform", "kl_weight": 0.0}
    algorithm = raft.Algorithm(raft.Config(**{**settings, **config}))
    _, density = law(number, keep)
    plan = Plan(steps=steps, rows=1500 * number, samples=number)
    curvature = np.full_like(density, 2 * keep / number)  # of a row's loss, that of all but the chosen being 0
    return trained(algorithm, fresh(lambda x: x[:, 0], seed, "reference"), curvature, density, plan)


def mean_rank(table: Array) -> float:
    """E F of its samples."""
    return float(np.interp(samples(table), BASE, RANKS).mean())


@pytest.mark.parametrize("number", [4, 8])
def test_raft_has_the_law_of_the_best(
    number: int, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    expected, density = law(number)
    measured(expected_rank=mean_rank(expected), exact_rank=number / (number + 1))
    for seed in seeds:
        found = fitted(number, seed)
        off, rank = distance(found, expected, density), mean_rank(found)
        measured(distance=off, rank=rank)
        case = f"best of {number}"
        proves("raft", "T8", case, "distance of the velocity to that of p N F^(N-1)", off, "below 5 %", percent=True)
        proves("raft", "T8", case, "mean rank of its samples", rank, f"{mean_rank(expected):.3f} ± 0.01")
        assert off < CLOSE
        assert abs(rank - mean_rank(expected)) < 0.01


@pytest.mark.parametrize("broken", [{"number": 6}, {"keep": 2}], ids=["best of more", "the two best"])
def test_another_choice_is_another_law(broken: dict[str, int], measured: Callable[..., None]):
    expected, density = law(4)
    found = fitted(**{"number": 4, **broken}, seed=0, steps=12)
    measured(distance=distance(found, expected, density))
    assert distance(found, expected, density) > 3 * CLOSE
