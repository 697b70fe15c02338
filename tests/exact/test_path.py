"""T5: without an anchor, small steps on fresh samples walk along p e^{S r} (EXACT_TESTS 4.2); S is how far they went.

    NFT                   S = n / (β M), M = adv_clip: each round goes to its loss's minimum
    RVM, AWM, EPG, FPO    L = A e, whose gradient in v is 2 A (v - u): S = n η for steps of η/2 times that; all but RVM
                          with a ratio to the weights that a step of two updates began with
    DGPO                  the same times σ(S_g), ½ at the start: its mean over the batch is counted into S
    RWR                   n exact rounds: S = n / T

In a mixture of three Gaussians, under a linear reward and under one that says which component a sample is of. Nothing
is assumed about the density of samples: its log ratio to the base model's is measured from samples of both.
"""

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from rlalign.algorithms import awm, dgpo, epg, fpo, nft, rvm, rwr
from rlalign.policy import Policy

from .conftest import Proof
from .mixture import Walk, components, fit, log_ratio_slope, make_policy, sample, walk

BETA, S = 8.0, 1.0
DGPO_BETA = 0.03  # small: σ(S_g) knows of the same noise as the gradient that it weighs, an error in S of this order
WEIGHTS, STD = [0.5, 0.3, 0.2], 0.6
FAR = 3.0
MEANS = {"linear": [[-2.5], [0.0], [2.5]], "indicator": [[-FAR], [0.0], [FAR]]}
BOUND = {"linear": 4.0, "indicator": 1.25}  # NFT's adv_clip, which no advantage reaches


def linear(x: Tensor) -> Tensor:
    return 0.5 * x[:, 0]


def region(x: Tensor) -> Tensor:
    """[b] 0, 1 or 2: the component whose mean is nearest."""
    return (x[:, 0] / FAR).round().clamp(-1, 1) + 1


def indicator(x: Tensor) -> Tensor:
    return region(x) / 2


REWARDS = {"linear": linear, "indicator": indicator}


EXACT: dict[str, Any] = {"advantage": "loo", "kl_weight": 0.0, "weighting": "uniform", "num_times": 4}
OPEN: dict[str, Any] = {**EXACT, "adv_clip": 1e9, "times": "grid"}
TWICE: dict[str, Any] = {**OPEN, "updates_per_step": 2}  # ratios that are 1 in the first of two updates alone

SIGNED: dict[str, Any] = {  # methods whose loss is A e, but for a ratio
    "rvm": rvm.Config(**OPEN, adv_scale=1.0),
    "awm": awm.Config(**TWICE, adv_max=None, teacher_weight=0.0),
    "epg": epg.Config(**TWICE, clip_range=None, old_decay=awm.Ramp(rate=0.0, max=0.0)),
    "fpo": fpo.Config(**TWICE, clip_range=1.0),
    "dgpo": dgpo.Config(**TWICE, beta=DGPO_BETA, clip_range=None),
}


def nft_config(name: str, **changes: Any) -> nft.Config:
    return nft.Config(**{**EXACT, "old_decay": 0, "beta": BETA, "adv_clip": BOUND[name], **changes})


def walked(
    name: str, seed: int, config: Any, sign: float = 1.0, length: float = S, rows: int = 4000
) -> tuple[Policy, float]:
    """And S. DGPO's steps are 2 σ(S_g) as long as they would be without its factor."""
    policy = make_policy(WEIGHTS, MEANS[name], STD)
    chosen = import_module(f"rlalign.algorithms.{config.name}").Algorithm(config)
    slowness = config.beta * config.adv_clip if config.name == "nft" else 16.0  # 1/η
    weight = 0.5 if config.name == "dgpo" else 1.0
    updates = config.updates_per_step
    plan = Walk(round(length * slowness), 2 * weight * slowness * updates, rows, updates=updates)
    told = walk(policy, chosen, lambda x: sign * REWARDS[name](x), seed, plan)
    lengths = [2 * means.get("group_weight", 0.5) / (slowness * updates) for means in told]
    return policy, sum(lengths)


def samples(policy: Policy, rows: int) -> tuple[Tensor, Tensor]:
    """Of the base model, and of the policy; from other noise."""
    generator = torch.Generator().manual_seed(12345)
    with policy.using("reference"):
        base = sample(policy, rows, 1, generator).final
    return base, sample(policy, rows, 1, generator).final


def slope(name: str, policy: Policy) -> tuple[float, float]:
    base, tuned = samples(policy, 120_000)
    return log_ratio_slope(REWARDS[name](base), REWARDS[name](tuned))


def assert_on_the_path(
    name: str, policy: Policy, way: float, measured: Callable[..., None], proves: Proof, method: str, case: str
) -> float:
    """Its slope in r, which is to be ``way``."""
    found, error = slope(name, policy)
    measured(slope=found / way, error=error / way)
    proves(method, "T5", case, "slope of the log density ratio in S r", found / way, "1 ± 0.05")
    assert 4 * error / way < 0.05
    assert found / way == pytest.approx(1, abs=0.05)
    return found


@pytest.mark.parametrize("name", REWARDS)
def test_nft(name: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    for seed in seeds:
        policy, way = walked(name, seed, nft_config(name))
        assert_on_the_path(name, policy, way, measured, proves, "nft", f"{name} reward")


@pytest.mark.parametrize("method", SIGNED)
def test_signed_regressions(method: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    config = SIGNED[method]
    case = "linear reward" + (", two updates a step" if config.updates_per_step > 1 else "")
    for seed in seeds:
        policy, way = walked("linear", seed, config)
        measured(way=way)
        found = assert_on_the_path("linear", policy, way, measured, proves, method, case)
        # without σ(S_g), which falls from ½ on the way, DGPO would seem to have left the path
        assert method != "dgpo" or abs(found / S - 1) > 0.05


def test_exact_rounds_of_rwr(seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    """Two rounds at T = 2; one round goes half the way."""
    for seed in seeds:
        policies = [make_policy(WEIGHTS, MEANS["linear"], STD) for _ in range(2)]
        for rounds, policy in enumerate(policies, 1):
            fit(policy, rwr.Algorithm(RWR), linear, seed, rounds, rows=12_000)
        found, error = slope("linear", policies[0])
        measured(one_round=found, error=error)
        assert abs(found / S - 1) > 0.05 + 4 * error / S
        assert_on_the_path("linear", policies[1], S, measured, proves, "rwr", "linear reward, two exact rounds")


RWR = rwr.Config(**OPEN, temperature=2.0, weights="exp", of="reward")


def by_component(method: str, seed: int) -> tuple[Policy, float]:
    """Trained on the reward that says which component a sample is of."""
    if method == "rwr":
        policy = make_policy(WEIGHTS, MEANS["indicator"], STD)
        fit(policy, rwr.Algorithm(RWR), indicator, seed, 2, rows=12_000)
        return policy, S
    return walked("indicator", seed, nft_config("indicator") if method == "nft" else SIGNED[method])


@pytest.mark.parametrize("method", ["nft", "rvm", "awm", "dgpo", "rwr"])
def test_modes_get_their_weights(method: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    """Against what the base model's samples weighted by e^{S r} say; at S = 1 by hand .325, .322, .354."""
    for seed in seeds:
        policy, way = by_component(method, seed)
        base, tuned = samples(policy, 4000)
        counts = region(tuned).long().bincount(minlength=3).double()
        expected = torch.tensor(WEIGHTS).double() * torch.tensor([0.0, 0.5 * way, way]).double().exp()
        result = chisquare(counts, len(tuned) * expected / expected.sum())
        unmoved = chisquare(region(base).long().bincount(minlength=3).double(), len(base) * expected / expected.sum())
        measured(p=result.pvalue, p_of_the_base=unmoved.pvalue)
        proves(method, "T5", "reward by component", "p of the modes' weights (χ²)", result.pvalue, "above 0.01")
        assert result.pvalue > 0.01
        assert unmoved.pvalue < 1e-6


def test_the_models_own_components_are_those_of_the_tilt(seeds: tuple[int, ...], measured: Callable[..., None]):
    """m_i + S s² a, and w_i e^{S a m_i} up to a factor; in weights the later means count as well."""
    for seed in seeds:
        weights, means = components(walked("linear", seed, nft_config("linear"), rows=10_000)[0])
        start = torch.tensor(MEANS["linear"]).double()
        tilted = torch.tensor(WEIGHTS).double() * (0.5 * S * start[:, 0]).exp()
        shift, off = (weights[:, None] * (means - start)).sum(), (weights - tilted / tilted.sum()).abs().max()
        measured(shift=shift.item(), expected=0.5 * S * STD**2, weights_off=off.item())
        assert shift.item() == pytest.approx(0.5 * S * STD**2, rel=0.1)
        assert off < 0.02


# --- negative controls


@pytest.mark.parametrize(
    ("config", "how", "expected"),
    [
        pytest.param({}, {"sign": -1.0}, -1.0, id="sign flipped"),
        pytest.param({}, {"length": S / 2}, 0.5, id="half the way"),
        pytest.param({"adv_mode": "positive_only"}, {}, None, id="positives only"),
        pytest.param({"adv_mode": "binary"}, {}, None, id="signs alone"),
        pytest.param({"adv_clip": 0.7}, {}, None, id="advantages clamped"),
    ],
)
def test_another_walk_is_noticed(
    config: dict[str, Any], how: dict[str, Any], expected: float | None, measured: Callable[..., None]
):
    found, error = slope("linear", walked("linear", 0, nft_config("linear", **config), **how)[0])
    measured(slope=found / S, error=error / S)
    assert abs(found / S - 1) > 0.05 + 4 * error / S
    if expected is not None:
        assert found / S == pytest.approx(expected, abs=0.05)


def test_the_ratio_is_measured_right():
    """The detector itself, on normal samples: log N(x; 1, 1)/N(x; 0, 1) has slope 1."""
    generator = torch.Generator().manual_seed(1)
    base, tuned = (torch.randn(20_000, generator=generator, dtype=torch.float64) for _ in range(2))
    found, error = log_ratio_slope(base, tuned + 1)
    assert found == pytest.approx(1, abs=4 * error) and error < 0.02
    assert math.isclose(log_ratio_slope(base, tuned)[0], 0, abs_tol=4 * error)
