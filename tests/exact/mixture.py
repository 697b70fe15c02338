"""Mixtures of Gaussians whose weights and means train: a policy class that holds every tilt p e^{S r} of a mixture by a
linear reward or by one that is constant on each component (EXACT_TESTS 5.3, 5.4), and steps that minimise in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rlalign.algorithms.base import Algorithm
from rlalign.algorithms.regularise import weight_of
from rlalign.mdp.noise import Noise
from rlalign.mdp.schedule import plain_sigmas
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Cond, Schedule, Size, Trajectory

from .training import scores_of

Reward = Callable[[Tensor], Tensor]
THETA = "velocity.theta"
SHIFT = 3.0


class Velocity(nn.Module):
    """v = Σ_i resp_i v_i of  Σ_i w_i N(m_i, s²), with log w = logits + the first M of θ, m = means + the rest."""

    def __init__(self, logits: Tensor, means: Tensor, std: float) -> None:
        super().__init__()
        self.logits, self.means, self.std = nn.Buffer(logits), nn.Buffer(means), std
        self.theta = nn.Parameter(torch.zeros(len(logits) + means.numel(), dtype=torch.float64))

    @property
    def components(self) -> tuple[Tensor, Tensor]:
        """Log weights [M], means [M, D]."""
        count = len(self.logits)
        log_weights = (self.logits + self.theta[:count]).log_softmax(0)
        return log_weights, self.means + self.theta[count:].view_as(self.means)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None]
        log_weights, means = self.components
        centred = x[:, None] - (1 - t) * means  # [B, M, D]
        spread = ((1 - t) * self.std).square() + t.square()  # [B, 1, 1]
        each = (t - (1 - t) * self.std**2) / spread * centred - means
        responsibility = (log_weights - (centred.square() / spread).sum(-1) / 2).softmax(-1)
        return (responsibility[..., None] * each).sum(1)


class Family:
    """The little that a policy asks of a model."""

    prediction = "velocity"

    def __init__(self, net: nn.Module, dim: int) -> None:
        self.net, self.dim, self.nets = net, dim, {"velocity": net}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return (self.dim,)

    def schedule(self, steps: int, size: Size) -> Schedule:
        sigma = plain_sigmas(steps, SHIFT)
        return Schedule(1 - sigma, sigma, 1000 * sigma)

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        return self.net(x, time.double() / 1000)


def make_policy(weights: list[float], means: list[list[float]], std: float, num_steps: int = 24) -> Policy:
    net = Velocity(torch.tensor(weights).double().log(), torch.tensor(means).double(), std)
    settings = RolloutConfig(size=(1, len(means[0])), num_steps=num_steps, solver="dpmpp_2m", kernel="ddim")
    policy = Policy(Family(net, len(means[0])), settings, {THETA: net.theta}, lora=False)  # pyright: ignore[reportArgumentType]
    policy.keep("old")
    return policy


def components(policy: Policy) -> tuple[Tensor, Tensor]:
    """Weights [M] and means [M, D] of the model as it is."""
    log_weights, means = policy.family.nets["velocity"].components  # pyright: ignore[reportGeneralTypeIssues]
    return log_weights.detach().exp(), means.detach()


def sample(policy: Policy, rows: int, samples: int, generator: torch.Generator, cond: Cond | None = None) -> Trajectory:
    return sample_from(
        policy, torch.randn(rows, *policy.latent_shape, generator=generator, dtype=torch.float64), samples, cond
    )


def sample_from(policy: Policy, start: Tensor, samples: int, cond: Cond | None = None) -> Trajectory:
    """Deterministic rollouts, nothing kept, in groups that differ in nothing but their address."""
    rows = len(start)
    schedule, cond = policy.schedule(policy.settings), cond or {"none": torch.zeros(rows, 0)}
    kept = torch.zeros(rows, 0, dtype=torch.int64)
    stochastic = torch.zeros(rows, schedule.num_steps, dtype=torch.bool)
    chain = policy.roll_out(start, cond, None, schedule, stochastic, kept, lambda _: start, policy.settings)
    group = torch.arange(rows) // samples
    address = torch.stack([torch.zeros_like(group), group, torch.arange(rows) % samples], 1)
    parts = (chain.x, chain.x_next, chain.log_probs, chain.final)
    return Trajectory(cond, None, schedule, kept, *parts, torch.zeros(rows, dtype=torch.int64), address)


class Plain:
    """Stands in for the Noise of one update, since addressed noise takes longer: one generator and a table.

    As with Noise a group that asks under its own address has one draw for all its rows.
    """

    def __init__(self, *seed: int) -> None:
        self.generator = torch.Generator().manual_seed(hash(seed))
        self.orders: dict[int, list[Tensor]] = {}

    def normal(self, purpose: str, address: Tensor, index: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
        if (address[:, 2] > 0).any():
            return torch.randn(len(address), *shape, generator=self.generator, dtype=dtype)
        groups = torch.randn(int(address[:, 1].max()) + 1, *shape, generator=self.generator, dtype=dtype)
        return groups[address[:, 1]]

    def permutation(self, purpose: str, address: tuple[int, int, int], n: int) -> Tensor:
        if n not in self.orders:
            self.orders[n] = [torch.randperm(n, generator=self.generator) for _ in range(997)]
        return self.orders[n][(31 * address[1] + address[2]) % 997]


@torch.no_grad()
def gram(policy: Policy, at: Trajectory, plain: Plain) -> Tensor:
    """[P, P]: E mean_D (∂v/∂θ_i)(∂v/∂θ_j) over the grid's levels, by differences."""
    theta, x0 = policy.parameters[THETA], at.final
    grid = at.schedule.sigma[:-1]
    t = grid[torch.randint(len(grid), (len(x0),), generator=plain.generator)]
    wide = t[:, None]
    x = (1 - wide) * x0 + wide * torch.randn(x0.shape, generator=plain.generator, dtype=x0.dtype)
    before, width = policy.predict_noised(at, x, t).velocity, 1e-4
    slopes: list[Tensor] = []
    for index in range(len(theta)):
        theta[index] += width
        slopes.append((policy.predict_noised(at, x, t).velocity - before) / width)
        theta[index] -= width
    J = torch.stack(slopes).flatten(1)
    return J @ J.T / J.shape[1]


@dataclass(frozen=True, slots=True)
class Walk:
    """``steps`` rounds of sampling and ``updates`` steps, each on its own share of the groups.

    ``curvature``: of a row's loss in v, which says how long a step is.
    """

    steps: int
    curvature: float
    rows: int = 4000
    samples: int = 8
    updates: int = 1


Means = dict[str, float]


def walk(policy: Policy, algorithm: Algorithm, reward: Reward, seed: int, plan: Walk) -> list[Means]:
    """SGD in natural units: δθ = -(curvature E J Jᵀ)⁻¹ gradient, J = ∂v/∂θ. Answers each update's metrics."""
    generator, theta = torch.Generator().manual_seed(seed), policy.parameters[THETA]
    optimizer, told = torch.optim.SGD([theta], lr=1.0), list[Means]()
    for name in algorithm.needs.copies:
        policy.keep(name)
    for step in range(plan.steps):
        with policy.using(algorithm.sample_with):
            batch = sample(policy, plan.rows, plan.samples, generator)
        plain = Plain(seed, step)
        given = algorithm.advantages(scores_of(reward(batch.final), plan.samples)).flatten().double()
        natural = torch.linalg.pinv(plan.curvature * gram(policy, batch, plain), hermitian=True, rtol=1e-6)
        for rows in torch.arange(plan.rows).chunk(plan.updates):
            told.append(pushed(policy, algorithm, batch.take(rows), given[rows], plain)[1])
            assert theta.grad is not None
            theta.grad.copy_(natural @ theta.grad)
            optimizer.step()
            optimizer.zero_grad()
        algorithm.after_step(policy, step + 1)
    return told


def fit(policy: Policy, algorithm: Algorithm, reward: Reward, seed: int, rounds: int, rows: int) -> None:
    """Each round goes all the way to the minimum of the loss of its samples, at one draw of times and noises."""
    generator, theta = torch.Generator().manual_seed(seed), policy.parameters[THETA]
    for step in range(rounds):
        batch = sample(policy, rows, 8, generator)
        optimizer = torch.optim.LBFGS([theta], max_iter=20, line_search_fn="strong_wolfe", tolerance_change=1e-7)

        def loss(batch: Trajectory = batch, optimizer: torch.optim.LBFGS = optimizer, step: int = step) -> float:
            optimizer.zero_grad()
            return backward(policy, algorithm, batch, reward, 8, Plain(seed, step))

        optimizer.step(loss)
        optimizer.zero_grad()
        algorithm.after_step(policy, step + 1)


def backward(
    policy: Policy, algorithm: Algorithm, batch: Trajectory, reward: Reward, samples: int, plain: Plain
) -> float:
    given = algorithm.advantages(scores_of(reward(batch.final), samples)).flatten().double()
    return pushed(policy, algorithm, batch, given, plain)[0]


def pushed(
    policy: Policy, algorithm: Algorithm, batch: Trajectory, advantages: Tensor, plain: Plain
) -> tuple[float, Means]:
    """Leaves the gradient of the mean loss; that loss, and metrics: means over times and rows, weighed by A²."""
    count = len(advantages)
    if algorithm.needs.silent_zero and weight_of(algorithm) == 0:  # as the learner does
        loud = advantages.nonzero().flatten()
        batch, advantages = batch.take(loud), advantages[loud]
    shares = advantages.square() / advantages.square().sum()
    total, told = 0.0, dict[str, list[float]]()
    for loss in algorithm.losses(policy, batch, advantages, cast(Noise, plain)):
        mean = loss.rows.sum() / count
        mean.backward()
        total += float(mean.detach())
        for name, values in loss.means.items():
            told.setdefault(name, []).append(float((shares * values).sum()))
    return total, {name: sum(values) / len(values) for name, values in told.items()}


def log_ratio_slope(base: Tensor, tuned: Tensor) -> tuple[float, float]:
    """Slope of log p_tuned/p_base against a number, from samples of both, and its standard error: logistic regression.

    It assumes nothing but that the log ratio is linear in the number.
    """
    values = torch.cat([base, tuned])
    features = torch.stack([values, torch.ones_like(values)], 1)
    label = torch.cat([torch.zeros_like(base), torch.ones_like(tuned)])
    w = torch.zeros(2, dtype=values.dtype)
    for _ in range(30):
        probability = (features @ w).sigmoid()
        information = features.T @ (features * (probability * (1 - probability))[:, None])
        w = w + torch.linalg.solve(information, features.T @ (label - probability))
    return float(w[0]), float(torch.linalg.inv(information)[0, 0].sqrt())
