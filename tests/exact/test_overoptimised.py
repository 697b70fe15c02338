"""T11: over-optimisation in one dimension. The proxy is the true reward plus a bump far from the data.

    gold = -½ (y - 1)²        proxy = gold + 12 exp(-½ ((y - 5)/1.6)²)

Without a penalty the policy climbs the proxy: gold rises, has its peak, and falls; the alarm ``reward_hacking`` has to
be raised after the peak, and never when the proxy is gold itself. GRPO in the chain of the other rungs, and RVM without
an anchor on a Gaussian whose mean trains.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import grpo, rvm
from rlalign.reporting.watch import Watch, WatchConfig
from tests.algorithms.chains import make_policy

from .conftest import Proof
from .mixture import Walk, sample, walk
from .mixture import make_policy as make_mixture
from .riccati import Quadratic, evaluate, solve
from .training import WIDE, Budget, chain_of, roll_out, train

BEST = 1.0
GOLD = Quadratic(torch.eye(1).double(), torch.tensor([BEST]).double())  # up to a constant
BUDGET = Budget(steps=60, groups=500, first=0.12)


def gold(y: Tensor) -> Tensor:
    return GOLD(y) - BEST**2 / 2


def proxy(y: Tensor) -> Tensor:
    return gold(y) + 12 * torch.exp(-((y.flatten() - 5) / 1.6).square() / 2)


@dataclass(frozen=True, slots=True)
class Curve:
    """Every few steps."""

    kl: list[float]  # of the path, exact
    gold: list[float]  # expected, exact
    proxy: list[float]
    mean: list[float]
    alarms: list[int]  # at which evaluations


def curve(reward: Callable[[Tensor], Tensor], seed: int, kl_weight: float = 0.0) -> Curve:
    """GRPO's."""
    policy = make_policy(num_steps=4, kernel="flow_sde", noise_level=0.7)
    chain, algorithm = chain_of(policy), grpo.Algorithm(grpo.Config(**WIDE, kl_weight=kl_weight))
    run = train(policy, algorithm, reward, 1.0, seed, BUDGET)
    laws: list[tuple[float, float, float]] = []
    for controls in run.path[::3]:
        out = evaluate(chain, controls, GOLD, torch.zeros(1).double(), torch.eye(1).double())
        laws.append((float(out.mean), float(out.covariance[0, 0].sqrt()), float(out.kl.sum())))
    return evaluated(reward, laws)


def forward_curve(reward: Callable[[Tensor], Tensor], seed: int) -> Curve:
    """RVM's: all but the mean stays, so the divergence from the base model is that of two Gaussians."""
    policy, laws = make_mixture([1.0], [[0.0]], 1.0), list[tuple[float, float, float]]()
    config = rvm.Config(advantage="loo", adv_clip=1e9, adv_scale=1.0, kl_weight=0.0, num_times=4, times="grid")
    for part in range(20):
        made = sample(policy, 4000, 1, torch.Generator().manual_seed(0)).final.flatten()
        laws.append((float(made.mean()), float(made.std()), float(made.mean()) ** 2 / 2))
        walk(policy, rvm.Algorithm(config), reward, 1000 * seed + part, Walk(3, 2 * 24.0, 2000))
    return evaluated(reward, laws)


CURVES = {"grpo": curve, "rvm": forward_curve}


def evaluated(reward: Callable[[Tensor], Tensor], laws: list[tuple[float, float, float]]) -> Curve:
    """Of samples with these means, stds and divergences, one evaluation after the other."""
    watch = Watch(WatchConfig(), clip_range=None, eps=1e-15, heldout=("gold",))
    found = Curve([], [], [], [], [])
    start = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for number, (mean, std, kl) in enumerate(laws):
        y = mean + std * start
        found.kl.append(kl)
        found.gold.append(float(gold(y).mean()))
        found.proxy.append(float(reward(y).mean()))
        found.mean.append(mean)
        metrics = {"reward/mean": found.proxy[-1], "reward/gold/mean": found.gold[-1], "diversity": 1.0}
        if "reward_hacking" in watch.evaluation(metrics):
            found.alarms.append(number)
    return found


@pytest.mark.parametrize("name", CURVES)
def test_gold_has_a_peak_on_the_way_and_the_alarm_follows_it(
    name: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    for seed in seeds:
        found = CURVES[name](proxy, seed)
        peak = max(range(len(found.gold)), key=found.gold.__getitem__)
        measured(peak_kl=found.kl[peak], peak_gold=found.gold[peak], mean_at_peak=found.mean[peak], peak_at=peak)
        alarm = found.alarms[0] if found.alarms else -1
        measured(last_gold=found.gold[-1], last_kl=found.kl[-1], alarm=alarm)
        measured(last_proxy=found.proxy[-1], first_gold=found.gold[0])
        proves(name, "T11", "no penalty", "mean of samples at gold's peak", found.mean[peak], "1 ± 0.3")
        proves(name, "T11", "no penalty", "evaluations from the peak to the alarm", alarm - peak, "1 to 5")
        assert 0 < peak < len(found.gold) - 4
        assert found.mean[peak] == pytest.approx(BEST, abs=0.3)  # between two evaluations it moves about so far
        assert found.gold[-1] < found.gold[0] - 1 < found.gold[peak]
        assert found.proxy[-1] == max(found.proxy)
        assert found.alarms and peak < found.alarms[0] <= peak + 5


@pytest.mark.parametrize("name", CURVES)
def test_no_alarm_when_the_reward_is_the_true_one(name: str, seeds: tuple[int, ...], measured: Callable[..., None]):
    for seed in seeds:
        found = CURVES[name](gold, seed)
        measured(last_gold=found.gold[-1], best=max(found.gold))
        assert not found.alarms
        assert found.gold[-1] > max(found.gold) - 0.02


def test_a_penalty_keeps_it_before_the_peak(seeds: tuple[int, ...], measured: Callable[..., None]):
    """With β = 1 the bump is out of reach: gold ends within what the penalty alone would leave of it."""
    policy = make_policy(num_steps=4, kernel="flow_sde", noise_level=0.7)
    chain = chain_of(policy)
    start = torch.zeros(1).double(), torch.eye(1).double()
    best = evaluate(chain, solve(chain, GOLD, 1.0, "direct").controls, GOLD, *start)
    for seed in seeds:
        found = curve(proxy, seed, kl_weight=1.0)
        measured(mean=found.mean[-1], of_gold_alone=float(best.mean), last_gold=found.gold[-1])
        assert not found.alarms
        assert found.mean[-1] < BEST


def test_the_start_is_the_base_policy():
    policy = make_policy(num_steps=4, kernel="flow_sde", noise_level=0.7)
    sampled = roll_out(policy, 20_000, 1, torch.Generator().manual_seed(0)).final
    assert gold(sampled).mean().item() == pytest.approx(curve(gold, 0).gold[0], abs=0.03)
