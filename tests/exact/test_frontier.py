"""T9: what is bought for how much. Measured points (KL, reward) of trained policies against the analytic frontier.

No policy of the chain gives more reward than  sqrt(2 KL qᵀVq), V = Cov(y_N | y_0)  above the base policy. KL is what
the algorithm logs, reward what samples score, so a divergence that is too small in the logs shows as a point above.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlalign.algorithms import grpo
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from tests.algorithms.chains import make_policy

from .riccati import Controls, Quadratic, through
from .training import WIDE, Budget, Interval, chain_of, put, roll_out, scores_of, train

BETAS = (0.5, 1.0, 2.0, 4.0)
REWARD = Quadratic(torch.zeros(2, 2).double(), torch.tensor([1.0, -0.5]).double())
BUDGET = Budget(steps=24, groups=1000)
GROUPS, SAMPLES = 8000, 8


def make() -> Policy:
    return make_policy(2, 4, kernel="flow_sde", noise_level=0.7, logprob_reduction="sum")


def point(policy: Policy, algorithm: grpo.Algorithm, seed: int) -> tuple[Interval, Interval]:
    """KL summed over steps as ``kl`` is logged, and reward over that of the base policy from the same noise."""
    sample = roll_out(policy, GROUPS, SAMPLES, torch.Generator().manual_seed(seed))
    with policy.using("reference"):
        base = roll_out(policy, GROUPS, SAMPLES, torch.Generator().manual_seed(seed))
    rewards = REWARD(sample.final)
    given = algorithm.advantages(scores_of(rewards, SAMPLES)).flatten().double()
    with torch.no_grad():
        logged = [loss.means["kl"] for loss in algorithm.losses(policy, sample, given, Noise(0))]
    return Interval.of(torch.stack(logged).sum(0)), Interval.of(rewards - REWARD(base.final))


def frontier(kl: float) -> float:
    _, _, variance = through(chain_of(make()))
    return float((2 * kl * (REWARD.q @ variance @ REWARD.q)).sqrt())


def excess(kl: Interval, reward: Interval) -> tuple[float, float]:
    """How far the point is above the frontier, and four standard errors of that."""
    error = (reward.error**2 + ((frontier(kl.mean + kl.error) - frontier(kl.mean)) ** 2)) ** 0.5
    return reward.mean - frontier(kl.mean), 4 * error


def learnt(beta: float, seed: int, **config: Any) -> tuple[Policy, grpo.Algorithm]:
    policy, algorithm = make(), grpo.Algorithm(grpo.Config(**WIDE, kl_weight=beta))
    put(policy, train(policy, algorithm, REWARD, beta, seed, BUDGET).controls)
    return policy, grpo.Algorithm(grpo.Config(**WIDE, kl_weight=beta, **config))


@pytest.mark.parametrize("beta", BETAS)
def test_no_point_is_above_the_frontier(beta: float, seeds: tuple[int, ...], measured: Callable[..., None]):
    """They are on it, too, and where β says: KL = qᵀVq/(2β²), reward qᵀVq/β."""
    _, _, variance = through(chain_of(make()))
    size = float(REWARD.q @ variance @ REWARD.q)
    for seed in seeds:
        kl, reward = point(*learnt(beta, seed), seed + 1000)
        above, bound = excess(kl, reward)
        measured(kl=kl.mean, expected_kl=size / (2 * beta**2), reward=reward.mean, expected=size / beta, above=above)
        assert above < bound
        assert reward.mean > 0.97 * frontier(kl.mean)
        assert kl.mean == pytest.approx(size / (2 * beta**2), rel=0.06)


def test_a_divergence_without_tau_puts_the_point_above(seeds: tuple[int, ...], measured: Callable[..., None]):
    for seed in seeds:
        kl, reward = point(*learnt(1.0, seed, kl_form="no_tau"), seed + 1000)
        above, bound = excess(kl, reward)
        measured(kl=kl.mean, reward=reward.mean, above=above, bound=bound)
        assert above > 5 * bound


def test_a_policy_that_wastes_its_divergence_is_below(measured: Callable[..., None]):
    """Half of every control in a direction that the reward does not see."""
    policy, algorithm = make(), grpo.Algorithm(grpo.Config(**WIDE, kl_weight=1.0))
    chain = chain_of(policy)
    gains, _, _ = through(chain)
    aside = torch.tensor([0.5, 1.0]).double()  # orthogonal to q, as long as it
    b = chain.c.square()[:, None] * (gains.mT @ (REWARD.q + aside))
    put(policy, Controls(torch.zeros_like(chain.F), b))
    kl, reward = point(policy, algorithm, 1000)
    measured(kl=kl.mean, reward=reward.mean, share=reward.mean / frontier(kl.mean))
    assert reward.mean == pytest.approx(frontier(kl.mean) / 2**0.5, rel=0.03)
