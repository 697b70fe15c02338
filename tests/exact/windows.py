"""Chains that are stochastic in a window of their steps alone, and where losses rest on them.

Outside the window a step is the solver's, by the same network: what was learnt for it while it was inside moves it too.
With w_k = (A_k, b_k) the residual velocity of step k, and s_k, o_k what one of it does to the kernel's and to Euler's
mean,

    y' = F_k y + f_k + s_k w_k(y) + c_k z   inside          y' = O_k y + o_k w_k(y)   outside

Rewards r(y) = -½ yᵀQy + qᵀy and penalties as in riccati.py. A loss sees what its own step does to the reward, in the
windows W that hold the step, and each divergence at the visited state (``direct``):

    Σ_W E[(p_{k+1} - P_{k+1} μ_k(y)) (y, 1)ᵀ] ω_k = (β s_k / c_k²) Σ_W E[w_k(y) (y, 1)ᵀ]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rlalign.policy import Policy
from tests.algorithms.chains import step, weight

from .riccati import Chain, Controls, Quadratic, evaluate
from .training import chain_of, slopes


@torch.no_grad()
def euler_of(policy: Policy) -> Chain:
    """As ``chain_of``, all steps deterministic."""
    schedule, dim = policy.schedule(policy.settings), weight(policy).shape[0]
    points = torch.cat([torch.zeros(1, dim), torch.eye(dim)]).double().reshape(-1, *policy.latent_shape)
    F, f = list[Tensor](), list[Tensor]()
    with policy.using("reference"):
        for k in range(schedule.num_steps):
            at = torch.full((len(points),), k)
            now, nxt = schedule.level(at, points), schedule.level(at + 1, points)
            shift, *columns = step(policy, points, now, nxt, schedule.time[at], last=True).mean.flatten(1)
            F.append(torch.stack([column - shift for column in columns], 1))
            f.append(shift)
    return Chain(torch.stack(F), torch.stack(f), torch.zeros(schedule.num_steps).double())


@dataclass(frozen=True, slots=False)
class Windowed:
    """A policy's chain under each of some windows, which are equally likely."""

    policy: Policy
    windows: Sequence[Sequence[int]]

    @cached_property
    def kernel(self) -> Chain:
        return chain_of(self.policy)

    @cached_property
    def solver(self) -> Chain:
        return euler_of(self.policy)

    @cached_property
    def pushes(self) -> tuple[Tensor, Tensor]:
        """s and o [N]."""
        sigma = self.policy.schedule(self.policy.settings).sigma.double()
        return slopes(self.policy), sigma[1:] - sigma[:-1]

    def under(self, window: Sequence[int], w: Tensor) -> tuple[Chain, Controls]:
        """Of weights w [N, D, D + 1]: the chain of the reference, and what they add to it."""
        inside = torch.zeros(len(w), dtype=torch.bool)
        inside[list(window)] = True
        s, o = self.pushes
        added = w * torch.where(inside, s, o)[:, None, None]
        F = torch.where(inside[:, None, None], self.kernel.F, self.solver.F)
        f = torch.where(inside[:, None], self.kernel.f, self.solver.f)
        return Chain(F, f, self.kernel.c * inside), Controls(added[..., :-1], added[..., -1])

    def rest(self, reward: Quadratic, beta: float, step_weights: Tensor | None = None) -> tuple[Controls, Tensor]:
        """Controls of kernel steps where the loss rests, by iteration, and second moments of the states there."""
        number, dim = self.kernel.f.shape
        omega = torch.ones(number).double() if step_weights is None else step_weights
        w, s = torch.zeros(number, dim, dim + 1).double(), self.pushes[0]
        start = torch.zeros(dim).double(), torch.eye(dim).double()
        moved, seen = 1.0, torch.zeros(number, dim + 1, dim + 1).double()
        for _ in range(200):
            pull, seen = torch.zeros_like(w), torch.zeros_like(seen)
            for window in self.windows:
                chain, added = self.under(window, w)
                moments = evaluate(chain, added, reward, *start).second_moments
                for k, slope in pulls(chain, added, reward):
                    if k in window:
                        pull[k] += slope @ moments[k]
                        seen[k] += moments[k]
            new = torch.zeros_like(w)
            for k in range(number):
                if seen[k].any():
                    new[k] = self.kernel.c[k] ** 2 * omega[k] / (beta * s[k]) * pull[k] @ torch.linalg.inv(seen[k])
            moved = float((new - w).norm() / new.norm())
            w = w + 0.5 * (new - w)
        assert moved < 1e-9
        u = w * s[:, None, None]
        return Controls(u[..., :-1], u[..., -1]), seen


def pulls(chain: Chain, added: Controls, reward: Quadratic) -> list[tuple[int, Tensor]]:
    """Of each step [D, D + 1]: the slope of E r in the mean of y', as an affine function of y."""
    P, p, found = reward.Q, reward.q, list[tuple[int, Tensor]]()
    for k in reversed(range(len(chain.f))):
        closed, shift = chain.F[k] + added.a[k], chain.f[k] + added.b[k]
        found.append((k, torch.cat([-P @ closed, (p - P @ shift)[:, None]], 1)))
        P, p = closed.T @ P @ closed, closed.T @ (p - P @ shift)
    return found


def multistep_gain(sigma: Tensor, start: int) -> float:
    """d y_N / d y_start of N(0, 1) data under DPM-Solver++ (2M), which has no history at ``start``."""
    y, before, length_before = 1.0, 0.0, 0.0
    for t, nxt in zip(sigma[start:-1].tolist(), sigma[start + 1 :].tolist(), strict=True):
        x0 = (1 - t) / ((1 - t) ** 2 + t**2) * y
        clean, length = x0, 0.0
        if nxt > 0:
            length = float(torch.tensor((1 - nxt) / nxt * t / (1 - t)).log())
            clean = x0 + (length / (2 * length_before) * (x0 - before) if length_before else 0.0)
        y = nxt / t * y + (1 - nxt - (1 - t) * nxt / t) * clean
        before, length_before = x0, length
    return y
