"""Ascent on a differentiable reward has no fixed point; its gradient is known (EXACT_TESTS 5.12), and goes under T1.

On N(0, I) data Euler's step is affine, x_{k+1} = x_k + τ_k v_k(x_k) with v_k(x) = a_k x + W_k (x, 1), and for each row

    ∂r/∂W_k = τ_k (Π_{j>k} (I + τ_j (a_j + A_j)))ᵀ ∇r(x_N) (x_k, 1)ᵀ       a_k = (2 t - 1) / (t² + (1 - t)²)

in the steps that are trained. DRTune leaves the product out, ReFL and DRaFT-LV look at x̂_0 = x - t v(x) instead.
Written without autograd and in float64; pictures are float32, which is what the bound of 1e-5 is for.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import alignprop, draft, drtune, refl
from rlalign.algorithms.reward_gradients import RewardGradient, start, step_of
from rlalign.policy import Policy
from rlalign.types import Prompt, Trajectory
from tests.algorithms.chains import make_policy, weight
from tests.algorithms.preferences import data_groups
from tests.algorithms.test_reward_gradients import NOISE, Q, gradient

from .conftest import Proof

STEPS, GROUPS, SIZE = 5, 4, 3
CLOSE = 1e-5


def setup(seed: int) -> tuple[Policy, Trajectory]:
    """Somewhere in the policy class; rows whose noise is that of their addresses."""
    policy = make_policy(dim=2, num_steps=STEPS)
    with torch.no_grad():
        weight(policy).copy_(0.1 * torch.randn(weight(policy).shape, generator=torch.Generator().manual_seed(seed)))
    batch = data_groups(policy, GROUPS, SIZE, seed)
    return policy, replace(batch, prompts=(Prompt("a"),) * (GROUPS * SIZE))


class Chain:
    """The deterministic chain of a policy, row by row."""

    def __init__(self, policy: Policy, batch: Trajectory) -> None:
        self.t = batch.schedule.sigma.double()
        self.tau, t = self.t[1:] - self.t[:-1], self.t[:-1]
        self.exact = (2 * t - 1) / (t.square() + (1 - t).square())
        self.W = weight(policy).detach().transpose(0, 1)  # [N, D, D + 1]
        self.x = [start(policy, batch, NOISE).flatten(1).double()]
        for k in range(STEPS):
            self.x.append(self.x[k] + self.tau[k] * self.velocity(k, self.x[k]))

    def velocity(self, k: int, x: Tensor) -> Tensor:
        return self.exact[k] * x + with_one(x) @ self.W[k].T

    def through(self, k: int) -> Tensor:
        """[D, D] d x_N / d x_{k+1}."""
        gain = torch.eye(2).double()
        for j in range(k + 1, STEPS):
            gain = (torch.eye(2) + self.tau[j] * (self.exact[j] * torch.eye(2) + self.W[j, :, :2])) @ gain
        return gain

    def of_steps(self, trained: Sequence[int], around: bool = False) -> Tensor:
        """[D, N, D + 1] gradient of -mean r."""
        found = torch.zeros_like(self.W)
        for k in trained:
            gain = torch.eye(2).double() if around else self.through(k)
            found[k] = -self.tau[k] * mean_of(slope(self.x[-1]) @ gain, self.x[k])
        return found.transpose(0, 1)

    def of_clean(self, k: int, states: Sequence[Tensor]) -> Tensor:
        """The same of -mean r(x̂_0), x̂_0 predicted in step k."""
        found = torch.zeros_like(self.W)
        for x in states:
            clean = x - self.t[k] * self.velocity(k, x)
            found[k] += self.t[k] * mean_of(slope(clean), x) / len(states)
        return found.transpose(0, 1)


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def slope(x: Tensor) -> Tensor:
    """∇r [b, D] of r = q x - |x|²/2, the reward of tests/algorithms/test_reward_gradients.py."""
    return Q - x


def mean_of(pull: Tensor, x: Tensor) -> Tensor:
    return pull.T @ with_one(x) / len(x)


def noised_again(policy: Policy, batch: Trajectory, copies: int) -> list[Tensor]:
    sigma = batch.schedule.sigma[STEPS - 1].double()
    drawn = [NOISE.normal("train/noise", batch.address, copy, policy.latent_shape) for copy in range(copies)]
    return [((1 - sigma) * batch.final + sigma * epsilon.double()).flatten(1) for epsilon in drawn]


def last(count: int) -> range:
    return range(STEPS - count, STEPS)


ALIGNPROP, DRTUNE = alignprop.Algorithm(alignprop.Config()), drtune.Algorithm(drtune.Config(trained_steps=2))
REFL = refl.Algorithm(refl.Config(late=(0.4, 0.8)))
Expected = Callable[[Chain, Policy, Trajectory], Tensor]
METHODS: dict[str, tuple[str, RewardGradient, Expected]] = {
    "K = 1": ("draft", draft.Algorithm(draft.Config()), lambda chain, policy, batch: chain.of_steps(last(1))),
    "K = 3": (
        "draft",
        draft.Algorithm(draft.Config(last_steps=3)),
        lambda chain, policy, batch: chain.of_steps(last(3)),
    ),
    "all steps": (
        "draft",
        draft.Algorithm(draft.Config(last_steps=STEPS)),
        lambda chain, policy, batch: chain.of_steps(last(STEPS)),
    ),
    "two noised copies": (
        "draft_lv",
        draft.Algorithm(draft.Config(noised_copies=2)),
        lambda chain, policy, batch: chain.of_clean(STEPS - 1, noised_again(policy, batch, 2)),
    ),
    "K drawn": (
        "alignprop",
        ALIGNPROP,
        lambda chain, policy, batch: chain.of_steps(last(ALIGNPROP.last_steps(STEPS, step_of(batch), NOISE))),
    ),
    "two steps, around the net": (
        "drtune",
        DRTUNE,
        lambda chain, policy, batch: chain.of_steps(DRTUNE.steps(STEPS, step_of(batch), NOISE), around=True),
    ),
    "x̂_0 of a late step": (
        "refl",
        REFL,
        lambda chain, policy, batch: chain.of_clean(
            REFL.step(STEPS, step_of(batch), NOISE), [chain.x[REFL.step(STEPS, step_of(batch), NOISE)]]
        ),
    ),
}


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", METHODS)
def test_gradients_through_the_sampler(name: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    names, algorithm, expected = METHODS[name]
    for seed in seeds:
        policy, batch = setup(seed)
        chain = Chain(policy, batch)
        distance = off(gradient(algorithm, policy, batch), expected(chain, policy, batch))
        measured(off=distance)
        proves(names, "T1", name, "distance of the gradient to the closed form", distance, "below 1e-5")
        assert distance < CLOSE


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param("K = 3", lambda chain: chain.of_steps(last(2)), id="a step too few"),
        pytest.param("all steps", lambda chain: chain.of_steps(last(STEPS), around=True), id="around the net"),
        pytest.param("x̂_0 of a late step", lambda chain: chain.of_steps(last(1)), id="the sample, not x̂_0"),
    ],
)
def test_another_gradient_is_noticed(name: str, wrong: Callable[[Chain], Tensor], measured: Callable[..., None]):
    _, algorithm, _ = METHODS[name]
    policy, batch = setup(0)
    distance = off(gradient(algorithm, policy, batch), wrong(Chain(policy, batch)))
    measured(distance=distance)
    assert distance > 1000 * CLOSE
