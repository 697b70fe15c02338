"""T11: over-optimisation in one dimension. The proxy is the true reward plus a bump far from the data.

    gold = -½ (y - 1)²        proxy = gold + 12 exp(-½ ((y - 5)/1.6)²)

Without a penalty the policy climbs the proxy: gold rises, has its peak, and falls; the alarm ``reward_hacking`` has to
be raised after the peak, and never when the proxy is gold itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import grpo
from rlalign.reporting.watch import Watch, WatchConfig
from tests.algorithms.chains import make_policy

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
    policy = make_policy(num_steps=4, kernel="flow_sde", noise_level=0.7)
    chain, algorithm = chain_of(policy), grpo.Algorithm(grpo.Config(**WIDE, kl_weight=kl_weight))
    run = train(policy, algorithm, reward, 1.0, seed, BUDGET)
    watch = Watch(WatchConfig(), clip_range=None, eps=1e-15, heldout=("gold",))
    found = Curve([], [], [], [], [])
    start = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for number, controls in enumerate(run.path[::3]):
        out = evaluate(chain, controls, GOLD, torch.zeros(1).double(), torch.eye(1).double())
        y = out.mean + out.covariance[0, 0].sqrt() * start
        found.kl.append(float(out.kl.sum()))
        found.gold.append(float(gold(y).mean()))
        found.proxy.append(float(reward(y).mean()))
        found.mean.append(float(out.mean))
        metrics = {"reward/mean": found.proxy[-1], "reward/gold/mean": found.gold[-1], "diversity": 1.0}
        if "reward_hacking" in watch.evaluation(metrics):
            found.alarms.append(number)
    return found


def test_gold_has_a_peak_on_the_way_and_the_alarm_follows_it(seeds: tuple[int, ...], measured: Callable[..., None]):
    for seed in seeds:
        found = curve(proxy, seed)
        peak = max(range(len(found.gold)), key=found.gold.__getitem__)
        measured(peak_kl=found.kl[peak], peak_gold=found.gold[peak], mean_at_peak=found.mean[peak], peak_at=peak)
        measured(last_gold=found.gold[-1], last_kl=found.kl[-1], alarm=found.alarms[0] if found.alarms else -1)
        measured(last_proxy=found.proxy[-1], first_gold=found.gold[0])
        assert 0 < peak < len(found.gold) - 4
        assert found.mean[peak] == pytest.approx(BEST, abs=0.3)  # between two evaluations it moves about so far
        assert found.gold[-1] < found.gold[0] - 1 < found.gold[peak]
        assert found.proxy[-1] == max(found.proxy)
        assert found.alarms and peak < found.alarms[0] <= peak + 5


def test_no_alarm_when_the_reward_is_the_true_one(seeds: tuple[int, ...], measured: Callable[..., None]):
    for seed in seeds:
        found = curve(gold, seed)
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
