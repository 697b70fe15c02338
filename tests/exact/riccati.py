"""The best controls of a linear-Gaussian chain under a quadratic reward and a KL penalty a step: two answers.

    y_{k+1} = F_k y_k + f_k + u_k(y_k) + c_k z        u_k(y) = a_k y + b_k        r(y) = -½ yᵀQy + qᵀy
    J = E r(y_N) - Σ_k β_k KL_k                       KL_k = E‖u_k(y_k)‖² / (2 c_k²)

``to_go`` is the optimum of J. ``direct`` is where a loss rests that differentiates each KL at the visited state alone,
as published ones do: it does not see what an action does to later KL terms. For Q = 0 they are the same.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Credit = Literal["to_go", "direct"]


@dataclass(frozen=True, slots=True)
class Chain:
    F: Tensor  # [N, D, D]
    f: Tensor  # [N, D]
    c: Tensor  # [N]   0 where a step is deterministic: it has no control


@dataclass(frozen=True, slots=True)
class Quadratic:
    """r(y) = -½ yᵀQy + qᵀy."""

    Q: Tensor  # [D, D]
    q: Tensor  # [D]

    def __call__(self, y: Tensor) -> Tensor:
        """[b, *L] -> [b]."""
        y = y.flatten(1)
        return y @ self.q - ((y @ self.Q) * y).sum(1) / 2

    def mean(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """E r under N(mean, covariance)."""
        return self.q @ mean - (mean @ self.Q @ mean + (self.Q @ covariance).trace()) / 2


@dataclass(frozen=True, slots=True)
class Controls:
    a: Tensor  # [N, D, D]
    b: Tensor  # [N, D]


@dataclass(frozen=True, slots=True)
class Solution:
    controls: Controls
    P: Tensor  # [N + 1, D, D]   value of step k: -½ yᵀP_k y + p_kᵀy + γ_k
    p: Tensor  # [N + 1, D]
    gamma: Tensor  # []   γ_0, of ``to_go``


@dataclass(frozen=True, slots=True)
class Outcome:
    mean: Tensor  # [D]   of y_N
    covariance: Tensor  # [D, D]
    reward: Tensor  # []   E r
    kl: Tensor  # [N]
    second_moments: Tensor  # [N, D + 1, D + 1]   E (y_k, 1)(y_k, 1)ᵀ


def solve(chain: Chain, reward: Quadratic, betas: float | Tensor, credit: Credit) -> Solution:
    """Backward through the steps. ValueError where (β/c²) I + P is not positive definite: J has no maximum."""
    number, dim = chain.f.shape
    betas = torch.as_tensor(betas, dtype=chain.f.dtype).expand(number)
    identity = torch.eye(dim, dtype=chain.f.dtype)
    P, p, gamma = [reward.Q], [reward.q], chain.f.new_zeros(())
    a, b = torch.zeros_like(chain.F), torch.zeros_like(chain.f)
    for k in reversed(range(number)):
        F, f, c, after, slope = chain.F[k], chain.f[k], chain.c[k], P[0], p[0]
        C = identity
        if c > 0:
            stiffness = betas[k] / c**2 * identity + after
            if torch.linalg.eigvalsh(stiffness).min() <= 0:
                raise ValueError(f"step {k}: (β/c²) I + P is not positive definite, so the objective has no maximum")
            a[k] = -torch.linalg.solve(stiffness, after @ F)
            b[k] = torch.linalg.solve(stiffness, slope - after @ f)
            C = torch.linalg.inv(identity + c**2 / betas[k] * after)
        gamma = gamma - c**2 * after.trace() / 2 - f @ after @ f / 2 + slope @ f + (slope - after @ f) @ b[k] / 2
        if credit == "to_go":
            M = after @ C
            P.insert(0, F.T @ M @ F)
            p.insert(0, F.T @ (C @ slope - M @ f))
        else:  # what the reward alone is worth under the controlled chain
            closed = F + a[k]
            P.insert(0, closed.T @ after @ closed)
            p.insert(0, closed.T @ (slope - after @ (f + b[k])))
    return Solution(Controls(a, b), torch.stack(P), torch.stack(p), gamma)


def evaluate(chain: Chain, controls: Controls, reward: Quadratic, mean: Tensor, covariance: Tensor) -> Outcome:
    """Forward from y_0 ~ N(mean, covariance): the law of y_N, E r and each step's KL, with graph."""
    kl: list[Tensor] = []
    second: list[Tensor] = []
    for F, f, c, a, b in zip(chain.F, chain.f, chain.c, controls.a, controls.b, strict=True):
        size = ((a @ mean + b).square().sum() + (a @ covariance @ a.T).trace()) / 2
        kl.append(size / c**2 if c > 0 else torch.zeros_like(size))
        around = torch.zeros(len(mean) + 1, len(mean) + 1, dtype=mean.dtype)
        around[:-1, :-1] = covariance
        with_one = torch.cat([mean, mean.new_ones(1)])
        second.append(around + with_one[:, None] * with_one)
        gain = F + a
        mean, covariance = gain @ mean + f + b, gain @ covariance @ gain.T + c**2 * torch.eye(len(mean)).to(mean)
    return Outcome(mean, covariance, reward.mean(mean, covariance), torch.stack(kl), torch.stack(second))


def distance(found: Controls, expected: Controls, second_moments: Tensor) -> float:
    """‖u - u*‖ / ‖u*‖, ‖u‖² = Σ_k E‖u_k(y_k)‖² over the given moments of the states."""

    def square(a: Tensor, b: Tensor) -> Tensor:
        joined = torch.cat([a, b[..., None]], -1)  # [N, D, D + 1]
        return (joined @ second_moments @ joined.mT).diagonal(dim1=1, dim2=2).sum()

    return float((square(found.a - expected.a, found.b - expected.b) / square(expected.a, expected.b)).sqrt())


def through(chain: Chain) -> tuple[Tensor, Tensor, Tensor]:
    """G_{k+1} = F_{N-1} ... F_{k+1} of every step [N, D, D], the whole gain F, and Cov(y_N | y_0)."""
    gains: list[Tensor] = []
    gain = torch.eye(chain.f.shape[1], dtype=chain.f.dtype)
    for F in chain.F.flip(0):
        gains.insert(0, gain)
        gain = gain @ F
    stacked = torch.stack(gains)
    return stacked, gain, (chain.c.square()[:, None, None] * stacked @ stacked.mT).sum(0)
