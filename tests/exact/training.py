"""A lean loop around the real parts: Policy.roll_out, Algorithm.advantages, Algorithm.losses and a torch optimizer.

Policies are those of tests/algorithms/chains.py: N(0, I) data, the exact velocity plus an affine residual for each
step, so that every optimum of riccati.py is in the policy class. Distances are measured in controls u_k, not weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from scipy.stats import t as student
from torch import Tensor

from rlalign.algorithms.base import Algorithm
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, RolloutConfig, draw_steps
from rlalign.types import RewardScores, Scores, Trajectory
from tests.algorithms.chains import WEIGHT, affine, weight

from .riccati import Chain, Controls, Quadratic, evaluate

Reward = Callable[[Tensor], Tensor]
WIDE: dict[str, Any] = {"advantage": "loo", "adv_clip": 1e9, "clip_range": 1.0}  # nothing is clipped; G/(G-1) included


@dataclass(frozen=True, slots=True)
class Budget:
    """One training: so many steps of so many groups."""

    steps: int = 30
    groups: int = 1000
    samples: int = 8
    shared: bool = True  # rows of a group start from the same noise: the baseline then knows what it contributes
    burn_in: float = 0.25  # share of the steps that is not averaged
    first: float = 0.8  # length of the first step in natural units; step t has first / sqrt(1 + t / 2)

    def length(self, step: int) -> float:
        return self.first / (1 + step / 2) ** 0.5


# --- between weights and controls


@torch.no_grad()
def chain_of(policy: Policy) -> Chain:
    """Of the reference."""
    with policy.using("reference"):
        parts = [affine(policy, k) for k in range(policy.settings.num_steps)]
    F, f, c = (torch.stack(part) for part in zip(*parts, strict=True))
    return Chain(F, f, c)


@torch.no_grad()
def slopes(policy: Policy) -> Tensor:
    """[N]: u_k per unit of residual velocity, a number that the kernel and the step give."""
    base, before = chain_of(policy), weight(policy).clone()
    weight(policy).zero_()
    weight(policy)[:, :, -1] = 1.0
    moved = torch.stack([affine(policy, k)[1] for k in range(policy.settings.num_steps)])
    weight(policy).copy_(before)
    return (moved - base.f)[:, 0]


def as_controls(weights: Tensor, slopes: Tensor) -> Controls:
    """weights [D, N, D + 1]; the last step, which is deterministic, is none."""
    u = weights.transpose(0, 1) * slopes[:, None, None]  # [N, D, D + 1]
    u = torch.cat([u[:-1], torch.zeros_like(u[-1:])])
    return Controls(u[..., :-1], u[..., -1])


@torch.no_grad()
def put(policy: Policy, controls: Controls) -> Policy:
    u = torch.cat([controls.a, controls.b[..., None]], -1) / slopes(policy)[:, None, None]
    weight(policy).copy_(u.transpose(0, 1))
    return policy


@torch.no_grad()
def held(policy: Policy) -> Controls:
    return as_controls(weight(policy).clone(), slopes(policy))


# --- rollouts


@dataclass(frozen=True, slots=True)
class Drawn:
    """The noise of one rollout, in place of Noise: plain torch randomness, since addressed noise takes longer.

    Algorithms that ask for a step's noise again get it.
    """

    samples: int  # of a group
    steps: dict[int, Tensor] = field(default_factory=dict[int, Tensor])  # [B, *L] of each stochastic step

    def normal(self, purpose: str, address: Tensor, index: int, shape: tuple[int, ...]) -> Tensor:
        assert purpose == "rollout/step"
        return self.steps[index][address[:, 1] * self.samples + address[:, 2]]


def roll_out(policy: Policy, groups: int, samples: int, generator: torch.Generator, shared: bool = False) -> Trajectory:
    return rolled(policy, groups, samples, generator, shared)[0]


def rolled(
    policy: Policy, groups: int, samples: int, generator: torch.Generator, shared: bool = False, number: int = 0
) -> tuple[Trajectory, Drawn]:
    """Stochastic and kept are the steps that the policy's settings draw for each group of batch ``number``."""
    rows, schedule = groups * samples, policy.schedule(policy.settings)
    stochastic, kept = (part.repeat_interleave(samples, 0) for part in drawn_steps(policy.settings, groups, number))
    cond = {"log_weights": torch.zeros(rows, 1, dtype=torch.float64)}

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, *policy.latent_shape, generator=generator, dtype=torch.float64)

    start = noise(groups).repeat_interleave(samples, 0) if shared else noise(rows)
    drawn = Drawn(samples)

    def next_noise(k: int) -> Tensor:
        drawn.steps[k] = noise(rows)
        return drawn.steps[k]

    chain = policy.roll_out(start, cond, None, schedule, stochastic, kept, next_noise, policy.settings)
    group, sample = torch.arange(rows) // samples, torch.arange(rows) % samples
    address = torch.stack([torch.zeros_like(group), group, sample], 1)
    parts = (chain.x, chain.x_next, chain.log_probs, chain.final)
    version = torch.zeros(rows, dtype=torch.int64)
    return Trajectory(cond, None, schedule, kept, *parts, version, address), drawn


def drawn_steps(settings: RolloutConfig, groups: int, number: int) -> tuple[Tensor, Tensor]:
    """[groups, N] bool and [groups, K]; where nothing is drawn all groups are alike."""
    window, alone = settings.window, settings.train_fraction == 1
    drawn = not alone or (window is not None and window.schedule == "random" and window.places(settings.num_steps) > 1)
    plans = [draw_steps(settings, True, Noise(1), number, group) for group in range(groups if drawn else 1)]
    stochastic, kept = (torch.stack(part) for part in zip(*plans, strict=True))
    return stochastic.expand(groups, -1), kept.expand(groups, -1)


def scores_of(rewards: Tensor, samples: int) -> Scores:
    """rewards [B] of whole groups."""
    values = rewards.reshape(-1, samples)
    valid = torch.ones_like(values, dtype=torch.bool)
    return Scores({"r": RewardScores(values, valid, "train", 1.0)}, ("",) * len(values))


# --- training


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training leaves: after each averaged step where a whole step would have led, and the gradient there.

    With a linear reward a whole step leads from anywhere to the optimum of its batch, so these points are independent.
    """

    points: list[Controls]
    gradients: list[Tensor]  # in natural units, as controls [N, D, D + 1]
    path: list[Controls] = field(default_factory=list[Controls])  # every iterate

    @property
    def controls(self) -> Controls:
        return mean_of(self.points)

    @property
    def gradient(self) -> float:
        """Norm of the mean gradient over the averaged steps."""
        return float(torch.stack(self.gradients).mean(0).norm())


def mean_of(points: Sequence[Controls]) -> Controls:
    return Controls(torch.stack([u.a for u in points]).mean(0), torch.stack([u.b for u in points]).mean(0))


def natural(policy: Policy, beta: float) -> Tensor:
    """[D, N, D + 1]: one over the curvature of the penalty β Σ_k E‖u_k‖² / (2 c_k²), mean over steps, at the reference.

    A gradient times this is a whole Newton step wherever the penalty is all that is curved.
    """
    chain, dim = chain_of(policy), weight(policy).shape[0]
    still = Controls(torch.zeros_like(chain.F), torch.zeros_like(chain.f))
    nothing = torch.zeros(dim, dtype=torch.float64)
    nowhere = Quadratic(torch.zeros(dim, dim).double(), nothing)
    moments = evaluate(chain, still, nowhere, nothing, torch.eye(dim).double()).second_moments
    scale = chain.c.square() / (beta * slopes(policy).square())
    per_entry = scale[:, None] / moments.diagonal(dim1=1, dim2=2)  # [N, D + 1]
    mean = policy.settings.logprob_reduction == "mean"
    return per_entry * seldom(policy.settings)[:, None] * (dim if mean else 1)


def seldom(settings: RolloutConfig) -> Tensor:
    """[N]: what the mean over kept steps and over groups leaves of a step's gradient, inverted; 0 where nothing is."""
    window, number = settings.window, settings.num_steps
    share = torch.zeros(number, dtype=torch.float64)  # of groups in which a step is stochastic
    if window is None:
        share[:-1] = 1
    elif window.schedule == "random":
        starts = range(window.bounds(number)[0], window.bounds(number)[0] + window.places(number))
        for start in starts:
            share[start : start + window.size] += 1 / len(starts)
    else:  # one after the other, each as if it were alone
        share[slice(*window.bounds(number))] = 1
    kept = settings.num_kept / (window.size if window else number - 1)
    return torch.where(share > 0, settings.num_kept / (share * kept), 0)


def train(
    policy: Policy,
    algorithm: Algorithm,
    reward: Reward,
    beta: float,
    seed: int,
    budget: Budget,
    advantages: Callable[[Tensor], Tensor] = lambda advantages: advantages,
    frozen: bool = False,
    corrected: bool = True,
) -> Trained:
    """SGD in natural units with decreasing steps. ``beta`` only says how long a natural step is.

    ``frozen``: all batches come from the reference. ``corrected`` False: old log-probs are computed again under the
    present weights, so that every ratio is 1.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter, unit, gains = policy.parameters[WEIGHT], natural(policy, beta), slopes(policy)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    points: list[Controls] = []
    gradients: list[Tensor] = []
    path: list[Controls] = []
    for step in range(budget.steps):
        with policy.using("reference" if frozen else "policy"):
            sample, drawn = rolled(policy, budget.groups, budget.samples, generator, budget.shared, step)
        if not corrected:
            sample = replace(sample, log_probs=scored_again(policy, sample))
        given = algorithm.advantages(scores_of(reward(sample.final), budget.samples)).flatten().double()
        for loss in algorithm.losses(policy, sample, advantages(given), cast(Noise, drawn)):
            loss.rows.mean().backward()
        algorithm.after_step(policy, step + 1)
        assert parameter.grad is not None
        parameter.grad.view_as(weight(policy)).mul_(unit)
        path.append(held(policy))
        if step >= budget.burn_in * budget.steps:
            whole = (parameter.detach() - parameter.grad).view_as(weight(policy))
            points.append(as_controls(whole, gains))
            gradients.append(parameter.grad.view_as(weight(policy)).transpose(0, 1) * gains[:, None, None])
        optimizer.param_groups[0]["lr"] = budget.length(step)
        optimizer.step()
        optimizer.zero_grad()
    path.append(held(policy))
    return Trained(points, gradients, path)


@torch.no_grad()
def scored_again(policy: Policy, sample: Trajectory) -> Tensor:
    """[B, K]"""
    slots = range(sample.num_kept)
    return torch.stack([policy.log_prob(policy.replay(sample, k).gaussian, sample.x_next[:, k]) for k in slots], 1)


# --- intervals


@dataclass(frozen=True, slots=True)
class Interval:
    mean: float
    error: float  # standard error
    count: int  # of what it is estimated from

    @staticmethod
    def of(values: Tensor) -> "Interval":
        """Of independent values."""
        return Interval(float(values.mean()), float(values.std() / len(values) ** 0.5), len(values))

    @staticmethod
    def between(runs: Sequence[Tensor]) -> "Interval":
        """Of seeds: each counts as one value, the mean of its points. A single one leaves only its points to go by."""
        if len(runs) > 1:
            return Interval.of(torch.stack([points.mean() for points in runs]))
        return Interval(float(runs[0].mean()), float(runs[0].std() / len(runs[0]) ** 0.5), 1)

    def half(self, level: float = 0.99) -> float:
        """Of the t interval; with a single seed four standard errors (EXACT_TESTS 8)."""
        return (4.0 if self.count == 1 else float(student.ppf((1 + level) / 2, self.count - 1))) * self.error

    def covers(self, value: float, level: float = 0.99) -> bool:
        return abs(self.mean - value) <= self.half(level)
