"""T9: what is bought for how much. Measured points (KL, reward) of trained policies against the analytic frontier.

No policy of the chain gives more reward than  sqrt(2 KL qᵀVq), V = Cov(y_N | y_0)  above the base policy. KL is what
the algorithm logs, reward what samples score, so a divergence that is too small in the logs shows as a point above.

Trajectory methods are trained in the chain that they are measured in. An anchored forward method is trained on samples
of an ODE (test_anchored.py) and measured in the memoryless chain of the same steps, whose frontier is the tilt's but
for the width of steps.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch

from rlalign.algorithms import dpok, flow_dppo, grpo, grpo_guard
from rlalign.algorithms.base import Algorithm
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, RolloutConfig
from tests.algorithms.chains import make_policy, weight

from . import test_anchored as anchored
from .conftest import Proof
from .riccati import Controls, Quadratic, through
from .training import WIDE, Budget, Interval, chain_of, put, roll_out, scores_of, train

BETAS = (0.5, 1.0, 2.0, 4.0)
REWARD = Quadratic(torch.zeros(2, 2).double(), torch.tensor([1.0, -0.5]).double())
BUDGET = Budget(steps=24, groups=1000)
GROUPS, SAMPLES = 8000, 8
SHARE = "reward over that of the frontier at its KL"


def make() -> Policy:
    return make_policy(2, 4, kernel="flow_sde", noise_level=0.7, logprob_reduction="sum")


def point(policy: Policy, algorithm: Algorithm, seed: int, reward: Quadratic = REWARD) -> tuple[Interval, Interval]:
    """KL summed over steps as ``kl`` is logged, and reward over that of the base policy from the same noise."""
    sample = roll_out(policy, GROUPS, SAMPLES, torch.Generator().manual_seed(seed))
    with policy.using("reference"):
        base = roll_out(policy, GROUPS, SAMPLES, torch.Generator().manual_seed(seed))
    rewards = reward(sample.final)
    given = algorithm.advantages(scores_of(rewards, SAMPLES)).flatten().double()
    with torch.no_grad():
        logged = [loss.means["kl"] for loss in algorithm.losses(policy, sample, given, Noise(0))]
    return Interval.of(torch.stack(logged).sum(0)), Interval.of(rewards - reward(base.final))


def frontier(kl: float, policy: Policy | None = None, reward: Quadratic = REWARD) -> float:
    _, _, variance = through(chain_of(policy or make()))
    return float((2 * kl * (reward.q @ variance @ reward.q)).sqrt())


def excess(kl: Interval, reward: Interval, of: Callable[[float], float] = frontier) -> tuple[float, float]:
    """How far the point is above the frontier, and four standard errors of that."""
    error = (reward.error**2 + ((of(kl.mean + kl.error) - of(kl.mean)) ** 2)) ** 0.5
    return reward.mean - of(kl.mean), 4 * error


METHODS: dict[str, Callable[[float], Any]] = {
    "grpo": lambda beta: grpo.Config(**WIDE, kl_weight=beta),
    "dpok": lambda beta: dpok.Config(kl_weight=beta, clip_range=1.0),
    "flow_dppo": lambda beta: flow_dppo.Config(advantage="loo", adv_clip=1e9, threshold=1e9, kl_weight=beta),
    "grpo_guard": lambda beta: grpo_guard.Config(**WIDE, kl_weight=beta),
}


def built(config: Any) -> Algorithm:
    return import_module(f"rlalign.algorithms.{config.name}").Algorithm(config)


def learnt(name: str, beta: float, seed: int) -> tuple[Policy, Algorithm]:
    policy, algorithm = make(), built(METHODS[name](beta))
    return put(policy, train(policy, algorithm, REWARD, beta, seed, BUDGET).controls), algorithm


@pytest.mark.parametrize(("name", "beta"), [*(("grpo", beta) for beta in BETAS), ("dpok", 1.0), ("flow_dppo", 1.0)])
def test_no_point_is_above_the_frontier(
    name: str, beta: float, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    """They are on it, too, and where β says: KL = qᵀVq/(2β²), reward qᵀVq/β."""
    _, _, variance = through(chain_of(make()))
    size = float(REWARD.q @ variance @ REWARD.q)
    for seed in seeds:
        kl, reward = point(*learnt(name, beta, seed), seed + 1000)
        above, bound = excess(kl, reward)
        measured(kl=kl.mean, expected_kl=size / (2 * beta**2), reward=reward.mean, expected=size / beta, above=above)
        share = reward.mean / frontier(kl.mean)
        proves(name, "T9", f"β = {beta:g}", SHARE, share, "not above 1")
        assert above < bound
        assert reward.mean > 0.97 * frontier(kl.mean)
        # quadratic in the controls, which T2 holds to 3 %
        assert kl.mean == pytest.approx(size / (2 * beta**2), rel=0.06)


def test_weights_of_steps_cost_reward(seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    """GRPO-Guard's own optimum is another: below the frontier, never above."""
    for seed in seeds:
        kl, reward = point(*learnt("grpo_guard", 3.0, seed), seed + 1000)
        above, bound = excess(kl, reward)
        share = reward.mean / frontier(kl.mean)
        measured(kl=kl.mean, reward=reward.mean, share=share)
        proves("grpo_guard", "T9", "β = 3", SHARE, share, "not above 1")
        assert above < bound
        assert share < 0.97


CALM = replace(anchored.SHORT, steps=32, first=0.4)
"""A whole tilt is far: in 16 steps, the first of 0.8, seed 3 goes astray and is not back in time (share 0.957)."""

TILTED = Quadratic(torch.zeros(2, 2).double(), anchored.A)


def memoryless(weights: torch.Tensor) -> Policy:
    """A policy of test_anchored.py with these weights [D, N, D + 1], in the memoryless chain.

    Without those of its last step, which is deterministic: it has no divergence, and would move samples free of charge.
    """
    own = anchored.make()
    settings = {"num_steps": anchored.LEVELS, "kernel": "memoryless", "logprob_reduction": "sum"}
    policy = Policy(own.family, RolloutConfig(size=(1, 2), **settings), own.parameters, lora=False)
    with torch.no_grad():
        weight(policy)[:, :-1].copy_(weights[:, :-1])
    return policy


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_an_anchored_method_is_on_the_frontier_of_the_tilt(
    beta: float, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    """RVM with weights in t alike; KL of the tilt is aᵀSa/(2β²)."""
    size = anchored.STD**2 * float(anchored.A @ anchored.A)
    for seed in seeds:
        found = anchored.trained(anchored.METHODS["rvm"](beta), seed, CALM, beta)
        policy = memoryless(found)
        kl, reward = point(policy, built(METHODS["grpo"](1.0)), seed + 1000, TILTED)
        above, bound = excess(kl, reward, lambda kl, at=policy: frontier(kl, at, TILTED))
        share = reward.mean / frontier(kl.mean, policy, TILTED)
        measured(kl=kl.mean, of_tilt=size / (2 * beta**2), share=share, above=above, bound=bound)
        proves("rvm", "T9", f"anchored, β = {beta:g}", SHARE, share, "not above 1")
        assert above < bound
        assert share > 0.97


def test_an_anchor_with_other_weights_in_time_is_below(measured: Callable[..., None]):
    config = anchored.METHODS["rvm"](1.0).model_copy(update={"weighting": "t2"})
    found = anchored.trained(config, 0, CALM, 1.0)
    policy = memoryless(found)
    kl, reward = point(policy, built(METHODS["grpo"](1.0)), 1000, TILTED)
    share = reward.mean / frontier(kl.mean, policy, TILTED)
    measured(kl=kl.mean, share=share)
    assert share < 0.97


def test_a_divergence_without_tau_puts_the_point_above(seeds: tuple[int, ...], measured: Callable[..., None]):
    for seed in seeds:
        policy, _ = learnt("grpo", 1.0, seed)
        kl, reward = point(policy, grpo.Algorithm(grpo.Config(**WIDE, kl_weight=1.0, kl_form="no_tau")), seed + 1000)
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
