"""A policy that can be anything in (x_t, t), and where methods rest in it, found without them (EXACT_TESTS 4.1, 4.3).

The data are a mixture of two Gaussians in one dimension. ``Table`` adds to its exact velocity a number δ at each knot
in x, linear in between, for each level of the rollout. What follows is numpy: the law of samples from quantiles of the
noise, moments given x_t as sums over them, and at each (x, t) the point of rest by itself.

    x_t = (1 - t) x0 + t ε      u = ε - x0 = (x_t - x0) / t      p(x0 | x_t) ∝ p(x0) exp(-(x_t - (1 - t) x0)² / (2 t²))
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor, nn

from rlalign.algorithms.base import Algorithm
from rlalign.mdp.schedule import plain_sigmas
from rlalign.policy import Policy, RolloutConfig, Variant
from rlalign.types import Trajectory

from .mixture import SHIFT, Family, Plain, Reward, Velocity, backward, sample

Array = np.ndarray[Any, np.dtype[np.float64]]
WEIGHTS, MEANS, STD = [0.6, 0.4], [-1.0, 1.0], 0.45
LEVELS, KNOTS, EDGE = 12, 31, 3.75
X: Array = np.linspace(-EDGE, EDGE, KNOTS)
SIGMAS: Array = plain_sigmas(LEVELS, SHIFT).double().numpy()
T: Array = SIGMAS[:-1]
TABLE = "velocity.table"


class Table(nn.Module):
    """The exact velocity, and δ at the nearest level."""

    def __init__(self) -> None:
        super().__init__()
        self.exact = Velocity(torch.tensor(WEIGHTS).double().log(), torch.tensor(MEANS).double()[:, None], STD)
        self.exact.requires_grad_(False)
        self.levels = nn.Buffer(torch.tensor(T))
        self.table = nn.Parameter(torch.zeros(LEVELS, KNOTS, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        level = (t[:, None] - self.levels).abs().argmin(1)
        place = ((x[:, 0] + EDGE) / (2 * EDGE) * (KNOTS - 1)).clamp(0, KNOTS - 1)
        left = place.floor().clamp(max=KNOTS - 2)
        at, flat = level * KNOTS + left.long(), self.table.flatten()
        return self.exact(x, t) + torch.lerp(flat[at], flat[at + 1], place - left)[:, None]


def make_policy() -> Policy:
    net = Table()
    settings = RolloutConfig(size=(1, 1), num_steps=LEVELS, solver="dpmpp_2m", kernel="ddim")
    policy = Policy(Family(net, 1), settings, {TABLE: net.table}, lora=False)  # pyright: ignore[reportArgumentType]
    for name in ("old", "teacher"):
        policy.keep(name)
    return policy


# --- the data, their tilts, and what a table samples


def velocity(x: Array, t: float, weights: Array, means: Array) -> Array:
    """[n] of the mixture with these weights and means."""
    centred, spread = x[:, None] - (1 - t) * means, ((1 - t) * STD) ** 2 + t**2
    each = (t - (1 - t) * STD**2) / spread * centred - means
    log = np.log(weights) - centred**2 / spread / 2
    share = np.exp(log - log.max(1, keepdims=True))
    return (share * each).sum(1) / share.sum(1)


def exact(x: Array, t: float) -> Array:
    return velocity(x, t, np.array(WEIGHTS), np.array(MEANS))


REFERENCE: Array = np.stack([exact(X, t) for t in T])  # [N, X]


def tilt(strength: float, linear: bool) -> Array:
    """[N, X] what p e^{S r} adds to the velocity, r = x or 1[x > 0]: exact of the components' labels."""
    weights, means = np.array(WEIGHTS), np.array(MEANS)
    tilted = weights * np.exp(strength * (means if linear else means > 0))
    moved = means + strength * STD**2 * linear
    return np.stack([velocity(X, t, tilted / tilted.sum(), moved) for t in T]) - REFERENCE


QUANTILES: Array = norm.ppf((np.arange(600) + 0.5) / 600)


def samples(table: Array, noise: Array = QUANTILES) -> Array:
    """[n] x0 from each noise [n] by DPM-Solver++ (2M)."""
    x, before, step = noise, np.zeros_like(noise), 0.0
    for k, (t, nxt) in enumerate(zip(T, SIGMAS[1:], strict=True)):
        x0 = x - t * (exact(x, t) + np.interp(x, X, table[k]))
        length = np.log((1 - nxt) / nxt * t / (1 - t)) if nxt > 0 and k > 0 else 0.0
        clean = x0 + length / (2 * step) * (x0 - before) if length > 0 and step > 0 else x0
        x = (1 - nxt) * clean + nxt * (x - (1 - t) * clean) / t
        before, step = x0, length
    return x


@dataclass(frozen=True, slots=False)
class Given:
    """Everything about samples x0 and rewards of them, given x_t = X at each level."""

    x0: Array  # [n]
    reward: Array  # [n]

    @cached_property
    def kernel(self) -> Array:
        """[N, X, n]: log p(x_t | x0), up to a constant of the level."""
        return np.stack([-((X[:, None] - (1 - t) * self.x0) ** 2) / (2 * t**2) for t in T])

    @cached_property
    def shares(self) -> Array:
        """[N, X, n] p(x0 | x_t)."""
        p = np.exp(self.kernel - self.kernel.max(2, keepdims=True))
        return p / p.sum(2, keepdims=True)

    @cached_property
    def density(self) -> Array:
        """[N, X] of x_t over the knots, as shares of each level."""
        p = np.exp(self.kernel).sum(2)
        return p / p.sum(1, keepdims=True)

    @cached_property
    def u(self) -> Array:
        """[N, X, n]"""
        return (X[:, None] - self.x0) / T[:, None, None]

    def mean(self, values: Array) -> Array:
        """[N, X] E(values | x_t), of [n] or [N, X, n]."""
        return self.shares @ values if values.ndim == 1 else (self.shares * values).sum(2)

    @cached_property
    def variance(self) -> Array:
        """[N, X] Var(u | x_t)."""
        return self.mean(self.u**2) - self.mean(self.u) ** 2


def distance(found: Array, expected: Array, density: Array, levels: slice = slice(None)) -> float:
    """‖found - expected‖ / ‖expected‖ over these levels, x_t as likely as it is."""
    off, size = density * (found - expected) ** 2, density * expected**2
    return float(np.sqrt(off[levels].sum() / size[levels].sum()))


def nearest_tilt(found: Array, linear: bool, density: Array, levels: slice = slice(None)) -> tuple[float, float]:
    """The strength S for which the tilt is nearest, and how far that is."""
    strengths = np.linspace(0.02, 3, 150)
    distances = [distance(tilt(s, linear), found, density, levels) for s in strengths]
    return float(strengths[np.argmin(distances)]), min(distances)


# --- points of rest


def anchored(reward: Callable[[Array], Array], kappa: Array, whole: bool = True) -> tuple[Array, Given]:
    """δ = κ(t) E[A (u - v) | x_t] by Picard iteration, x0 ~ the policy, A = r - E r.

    That is κ Cov(r, u | x_t) + κ E[A | x_t] (E[u | x_t] - v). The second term is 0 where v is the mean velocity of the
    policy's own samples, which an anchored policy is not quite; ``whole`` False leaves it out.
    """
    table = np.zeros((LEVELS, KNOTS))
    for _ in range(40):
        x0 = samples(table)
        r = reward(x0)
        given = Given(x0, r - r.mean())
        a, au = given.mean(given.reward), (given.shares * given.u) @ given.reward
        if whole:  # δ (1 + κ a) = κ (E[A u] - a v_ref); below 0 it runs away, where there is hardly a sample
            new = kappa[:, None] * (au - a * REFERENCE) / np.maximum(1 + kappa[:, None] * a, 0.1)
        else:
            new = kappa[:, None] * (au - a * given.mean(given.u))
        moved = distance(table, new, given.density)
        table = table + 0.3 * (new - table)
    assert moved < 0.01  # a reward that jumps moves by one sample more or less
    return table, given


# --- training


@dataclass(frozen=True, slots=True)
class Plan:
    """Rounds of samples and one step, in units that the curvature of the loss gives."""

    steps: int
    rows: int = 4000
    samples: int = 8
    parts: int = 1  # batches a step: where rows are compared with each other, several small ones take less time
    levels: int = LEVELS  # that are trained
    first: float = 0.7  # length of the first step


class EveryLevel(Plain):
    """Where each sample is looked at at all levels their order does not matter."""

    def permutation(self, purpose: str, address: tuple[int, int, int], n: int) -> Tensor:
        return self.orders.setdefault(n, [torch.arange(n)])[0]


Draw = Callable[[Policy, int, Plan], tuple[Trajectory, Reward, Plain]]
"""The batch of one number, what scores it, and the noise that its losses ask for."""


def fresh(reward: Reward, seed: int, weights: Variant) -> Draw:
    generator = torch.Generator().manual_seed(seed)

    def draw(policy: Policy, number: int, plan: Plan) -> tuple[Trajectory, Reward, Plain]:
        with policy.using(weights):
            return sample(policy, plan.rows, plan.samples, generator), reward, EveryLevel(seed, number)

    return draw


def trained(algorithm: Algorithm, draw: Draw, curvature: Array, density: Array, plan: Plan) -> Array:
    """[N, X] mean of δ over all steps but the first quarter; curvature [N, X]: of a row's loss in v."""
    policy = make_policy()
    units, parameter = plan.levels * torch.tensor(inverse_mass(density * curvature)), policy.parameters[TABLE]
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    total = torch.zeros_like(parameter)
    for step in range(plan.steps):
        for part in range(plan.parts):
            batch, reward, plain = draw(policy, step * plan.parts + part, plan)
            backward(policy, algorithm, batch, reward, plan.samples, plain)
        assert parameter.grad is not None
        parameter.grad.copy_((units @ parameter.grad[..., None])[..., 0] / plan.parts)
        optimizer.param_groups[0]["lr"] = plan.first / (1 + step / 4) ** 0.5
        optimizer.step()
        optimizer.zero_grad()
        algorithm.after_step(policy, step + 1)
        if 4 * step >= plan.steps:
            total += parameter.detach()
    return (total / (plan.steps - (plan.steps + 3) // 4)).numpy()


def inverse_mass(weights: Array) -> Array:
    """[N, K, K] the inverse of E φ_i φ_j times ``weights`` [N, X] of each knot; φ are the hats of the knots."""
    diagonal, beside = weights * 2 / 3, (weights[:, 1:] + weights[:, :-1]) / 12
    mass = np.stack([np.diag(d) + np.diag(b, 1) + np.diag(b, -1) for d, b in zip(diagonal, beside, strict=True)])
    return np.linalg.inv(mass + 0.002 * weights.max(1)[:, None, None] * np.eye(KNOTS))
