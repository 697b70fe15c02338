"""T6: on a mixture methods rest at points of their own, found here by numerics (grid.py, regressions.py).

With an anchor: the fixed point of κ(t) E[A (u - v) | x_t] over the policy's own samples. Without one, but with an error
that is squared or squashed for each sample (CRD, PAR, Diffusion-DPO, KTO): the minimum of that, point by point.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import norm, qmc
from torch import Tensor

from rlalign.algorithms import awm, crd, dpo, epg, kto, ram, rvm
from rlalign.policy import Policy
from rlalign.types import Trajectory

from .conftest import Proof
from .grid import (
    KNOTS,
    LEVELS,
    REFERENCE,
    Array,
    Draw,
    EveryLevel,
    Given,
    Plan,
    T,
    anchored,
    distance,
    fresh,
    nearest_tilt,
    samples,
    tilt,
    trained,
)
from .mixture import Plain, Reward, sample_from
from .regressions import MIDDLE, NOTHING, PAIRED, per_sample
from .regressions import dpo as rest_of_dpo
from .regressions import kto as rest_of_kto

TOLERANCE = 0.05
KEPT = awm.Ramp(start=1.0, rate=0.0, max=1.0)  # old weights that never move
MOVED = awm.Ramp(rate=0.0, max=0.0)  # none but the policy's own


def told(proves: Proof, names: str | tuple[str, ...], case: str, distance: float) -> None:
    proves(names, "T6", case, "distance to its own fixed point", distance, "below 5 %", percent=True)


def built(config: Any) -> Any:
    return import_module(f"rlalign.algorithms.{config.name}").Algorithm(config)


# --- with an anchor

ANCHORED: dict[str, Any] = {"advantage": "loo", "adv_clip": 1e9, "num_times": LEVELS, "times": "grid"}
BETA = {"linear": 3.5, "indicator": 1.0}  # of smaller ones samples in the tails run away: β + E[A | x_t] < 0
PLAN = Plan(steps=40)
EVEN = np.ones(LEVELS)
NOISY = (1 - T) / T  # the elbo's weight; 0.98 of that of flow_sde, but for t = 1
FLOW_SDE = (1 - np.minimum(T, 0.99)) / (2 * 0.7**2 * T)

METHODS: dict[str, tuple[Callable[[float], Any], Array, Array]] = {  # config, weight of the policy term, of the anchor
    "rvm": (lambda beta: rvm.Config(**ANCHORED, adv_scale=1.0, kl_weight=beta), EVEN, EVEN),
    "awm-t": (
        lambda beta: awm.Config(
            **ANCHORED, adv_max=None, clip_range=1e9, teacher_weight=0.0, kl_weight=beta, weighting="t"
        ),
        T,
        EVEN,
    ),
    "epg-elbo": (
        lambda beta: epg.Config(
            **ANCHORED, clip_range=None, old_decay=MOVED, kl_weight=beta, weighting="elbo", kl_weighting="flow_sde"
        ),
        NOISY,
        FLOW_SDE,
    ),
    "ram-t": (
        lambda beta: ram.Config(**ANCHORED, kappa=1 / beta, baseline="policy", weighting="t", kl_weight=0.5),
        T,
        T + 0.5,
    ),
}


def as_array(name: str) -> Callable[[Array], Array]:
    return {"linear": lambda x: x, "indicator": lambda x: (x > 0).astype(float)}[name]


def as_tensor(name: str) -> Reward:
    return {"linear": lambda x: x[:, 0], "indicator": lambda x: (x[:, 0] > 0).double()}[name]


def run(method: str, name: str, seed: int, plan: Plan = PLAN, sign: float = 1.0, scale: float = 1.0) -> Array:
    build, _, of_anchor = METHODS[method]
    config, reward = build(scale * BETA[name]), as_tensor(name)
    curvature = (1 if config.name == "ram" else scale * BETA[name]) * of_anchor
    given = Given(samples(NOTHING), np.zeros(1))
    draw = fresh(lambda x: sign * reward(x), seed, "policy")
    return trained(built(config), draw, 2 * curvature[:, None] + np.zeros((LEVELS, KNOTS)), given.density, plan)


@pytest.mark.parametrize(("method", "name"), [*[(method, "linear") for method in METHODS], ("rvm", "indicator")])
def test_anchored_methods(method: str, name: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    _, of_policy, of_anchor = METHODS[method]
    kappa = np.divide(of_policy, BETA[name] * of_anchor)
    expected, given = anchored(as_array(name), kappa)
    published, exact = anchored(as_array(name), kappa, whole=False)[0], tilt(1 / BETA[name], name == "linear")
    measured(tilt=distance(exact, expected, given.density), covariance=distance(published, expected, given.density))
    for seed in seeds:
        found = run(method, name, seed)
        measured(distance=distance(found, expected, given.density), to_tilt=distance(found, exact, given.density))
        told(proves, method.partition("-")[0], f"{method}, {name} reward", distance(found, expected, given.density))
        assert distance(found, expected, given.density) < TOLERANCE
        assert distance(found, exact, given.density) > 1.5 * TOLERANCE


@pytest.mark.parametrize("broken", [{"sign": -1.0}, {"scale": 1.3}], ids=["sign flipped", "another weight"])
def test_another_objective_rests_elsewhere(broken: dict[str, float], measured: Callable[..., None]):
    expected, given = anchored(as_array("linear"), EVEN / BETA["linear"])
    off = distance(run("rvm", "linear", 0, Plan(steps=16), **broken), expected, given.density)
    measured(distance=off)
    assert off > 3 * TOLERANCE


# --- a regression for each sample

BASE = Given(samples(NOTHING), samples(NOTHING) - samples(NOTHING).mean())
SQUARE = BASE.mean((BASE.u - REFERENCE[..., None]) ** 2)  # E[W² | x_t]
LOOKED: dict[str, Any] = {"num_times": 4, "times": "grid", "time_range": (0.65, 0.87)}
BOUND, SCALE = 20.0, 0.02


def off(found: Array, expected: Array, levels: slice = MIDDLE) -> float:
    return distance(found, expected, BASE.density, levels)


def of_crd(beta: float = SCALE) -> tuple[Any, Array, Array]:
    """Algorithm, curvature, point of rest."""
    settings: dict[str, Any] = {
        "advantage": "center",
        "adv_clip": BOUND,
        "beta": beta,
        "self_normalized": False,
        "kl_weight": 0.0,
    }
    chosen = crd.Config(**LOOKED, **settings, teacher_decay=KEPT, old_decay=KEPT)
    half = Given(BASE.x0, BASE.reward / (2 * BOUND))
    return built(chosen), 8 * BOUND * beta * SQUARE, per_sample(half, beta, EVEN, centred=True, importance=False)


def of_par(importance: bool, slope: float = 0.5) -> tuple[Any, Array, Array]:
    preset = epg.PRESETS["par"]["algorithm"]
    settings: dict[str, Any] = {
        "advantage": "loo",
        "adv_clip": 1e9,
        "clip_range": None,
        "old_decay": KEPT,
        "importance": importance,
    }
    expected = per_sample(Given(BASE.x0, slope * BASE.reward), 1.0, np.maximum(NOISY, 1e-9), False, importance)
    return built(epg.Config(**LOOKED, **settings, **preset)), 4 * NOISY[:, None] ** 2 * SQUARE + 1e-9, expected


REGRESSIONS = {
    "crd": (of_crd, 1.0, Plan(steps=32, rows=400, parts=4, levels=4, first=0.5)),
    "par": (lambda: of_par(True), 0.5, Plan(steps=32, levels=4, first=0.5)),
    "par-no importance": (lambda: of_par(False), 0.5, Plan(steps=32, levels=4, first=0.5)),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regressions(name: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    build, slope, plan = REGRESSIONS[name]
    algorithm, curvature, expected = build()
    strength, nearest = nearest_tilt(expected, True, BASE.density, MIDDLE)
    measured(nearest_tilt=nearest, strength=strength)
    assert nearest > 3 * TOLERANCE
    for seed in seeds:
        draw = fresh(lambda x: slope * x[:, 0], seed, "reference")
        found = trained(algorithm, draw, curvature, BASE.density, plan)
        measured(distance=off(found, expected))
        names = {"crd": ("crd",), "par": ("epg", "par", "pepg")}[name.partition("-")[0]]
        told(proves, names, name, off(found, expected))
        assert off(found, expected) < TOLERANCE


def test_a_regression_with_another_weight_rests_elsewhere(measured: Callable[..., None]):
    algorithm, curvature, _ = of_crd(1.3 * SCALE)
    plan = Plan(steps=12, rows=400, parts=4, levels=4, first=0.5)
    found = trained(algorithm, fresh(lambda x: x[:, 0], 0, "reference"), curvature, BASE.density, plan)
    measured(distance=off(found, of_crd()[2]))
    assert off(found, of_crd()[2]) > 3 * TOLERANCE


# --- preferences: of two samples the first is preferred with the chance σ(slope (a - b))


class Shared(EveryLevel):
    """One noise a group, given."""

    def __init__(self, epsilon: Tensor, *seed: int) -> None:
        super().__init__(*seed)
        self.epsilon = epsilon

    def normal(self, purpose: str, address: Tensor, index: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
        return self.epsilon[address[:, 1]].reshape(-1, *shape)


def judged(slope: float, seed: int) -> Draw:
    """Pairs of the reference; noises and verdicts are spread evenly (Sobol), which saves most of their randomness."""
    source = qmc.Sobol(4, rng=seed)

    def draw(policy: Policy, number: int, plan: Plan) -> tuple[Trajectory, Reward, Plain]:
        points = source.random(plan.rows // 2).clip(1e-9, 1 - 1e-9)
        a, b, epsilon = (torch.tensor(norm.ppf(points[:, i])) for i in range(3))
        with policy.using("reference"):
            batch = sample_from(policy, torch.stack([a, b], 1).reshape(-1, 1), 2)

        def verdicts(x: Tensor) -> Tensor:
            ahead = slope * (x[::2, 0] - x[1::2, 0]).numpy()
            first = torch.tensor(points[:, 3] < expit(ahead)).double()
            return torch.stack([first, 1 - first], 1).flatten()

        return batch, verdicts, Shared(epsilon, seed, number)

    return draw


TWO: dict[str, Any] = {**LOOKED, "num_times": 2, "time_range": (0.7, 0.82)}
PAIRS = Plan(steps=36, rows=512, samples=2, parts=8, levels=2, first=1.2)
SQUARED = replace(PAIRS, first=0.7)  # IPO: its curvature is no upper bound, and grows with the way gone


def of_dpo() -> tuple[Any, Array]:
    return built(dpo.Config(**TWO, beta=4.0)), 4 * SQUARE


def of_ipo() -> tuple[Any, Array]:
    return built(dpo.Config(**TWO, beta=IPO, loss="ipo")), 2 * SQUARE


def of_kto() -> tuple[Any, Array]:
    return built(kto.Config(**TWO, beta=0.3, liked_weight=4.0)), np.full_like(SQUARE, 0.225)


IPO = 1.0

PREFERENCES: dict[str, Any] = {  # algorithm, slope, where it rests, and where another weight would
    "dpo": (of_dpo, 2.0, lambda: rest_of_dpo(2.0, 4.0), lambda: rest_of_dpo(2.0, 5.5)),
    "ipo": (of_ipo, 2.0, lambda: rest_of_dpo(2.0, IPO, "ipo"), lambda: rest_of_dpo(2.0, 1.4 * IPO, "ipo")),
    "kto": (of_kto, 1.0, lambda: rest_of_kto(1.0, 0.3, 4.0), lambda: rest_of_kto(1.0, 0.3, 5.5)),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    """DPO's point is at no tilt; KTO's lies so near to one that only its strength would give it away."""
    build, slope, rest, elsewhere = PREFERENCES[name]
    expected, other = rest(), elsewhere()
    strength, nearest = nearest_tilt(expected, True, BASE.density, PAIRED)
    measured(nearest_tilt=nearest, strength=strength)
    for seed in seeds:
        algorithm, curvature = build()
        plan = SQUARED if name == "ipo" else PAIRS
        found = trained(algorithm, judged(slope, seed), curvature, BASE.density, plan)
        measured(distance=off(found, expected, PAIRED), to_another_weight=off(found, other, PAIRED))
        names = {"dpo": ("dpo", "online_dpo")}.get(name, (name,))
        told(proves, names, f"{name}, pairs of the reference", off(found, expected, PAIRED))
        assert off(found, expected, PAIRED) < TOLERANCE
        assert off(found, other, PAIRED) > 2 * TOLERANCE
