"""The only denoising loop of the repository: from noise to sample, stochastic in some steps, with their densities."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.mdp.prediction import Prediction
from rlalign.mdp.solvers import History, Solver, restart
from rlalign.mdp.transition import Gaussian
from rlalign.types import Graph, Level, Schedule

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Chain:
    """What a rollout leaves: the kept steps exactly as they were scored, and the sample."""

    x: Tensor  # [B, K, *L]   before each kept step
    x_next: Tensor  # [B, K, *L]   after it, rounded
    log_probs: Tensor  # [B, K]   in the latents' precision
    final: Tensor  # [B, *L]
    graphs: tuple[Graph, ...] = ()
    gaussians: Gaussian | None = None  # mean [B, K, *L], std [B, K, 1, ...]: what else x_next might have been


@torch.no_grad()
def rollout(
    predict: Callable[[Tensor, int], Prediction],
    x: Tensor,
    schedule: Schedule,
    stochastic: Tensor,
    kept: Tensor,
    kernel: Callable[[Tensor, Prediction, Level, Level], Gaussian],
    solver: Solver,
    noise: Callable[[int], Tensor],
    log_prob: Callable[[Gaussian, Tensor], Tensor],
    round_to: torch.dtype | None = None,
    retain: bool = False,
    gaussians: bool = False,
) -> Chain:
    """Denoises x [B, *L]. Rows may differ in which steps are stochastic [B, N] bool and which of those are kept [B, K].

    predict(x, k) is the guided prediction at step k; noise(k) -> [B, *L] is asked for only where a row needs it. With
    ``round_to`` every state is rounded to that precision, before it is scored, and goes on in x's own. With ``retain``
    the kept steps' log-probs are there once more with their graphs, each that of its step alone. With ``gaussians`` the
    kept steps' distributions are there as well, and the chain ends with the last kept step of all rows.
    """
    stochastic, kept = stochastic.cpu(), kept.cpu()
    _check(x, schedule, stochastic, kept)
    x = rounded(x, round_to)
    befores = x.new_empty(*kept.shape, *x.shape[1:])
    afters, log_probs = torch.empty_like(befores), x.new_empty(kept.shape)
    spread = _room_for_gaussians(befores) if gaussians else None
    history: History | None = None
    graphs: list[Graph] = []
    for k in range(int(kept.max()) + 1 if gaussians else schedule.num_steps):
        rows, slots = (index.to(x.device) for index in (kept == k).nonzero(as_tuple=True))
        with torch.set_grad_enabled(retain and len(rows) > 0):
            prediction = predict(x, k)
            gaussian, x_next, history = _step(
                x, prediction, schedule, k, stochastic[:, k], history, kernel, solver, noise
            )
            x_next = rounded(x_next.detach(), round_to)
            if gaussian is not None and len(rows):
                befores[rows, slots], afters[rows, slots] = x[rows], x_next[rows]
                scored = log_prob(gaussian, x_next)[rows]
                log_probs[rows, slots] = scored.detach()
                if spread is not None:
                    spread.mean[rows, slots] = gaussian.mean[rows].detach()
                    spread.std[rows, slots] = gaussian.std[rows].detach()
                if retain:
                    graphs.append(Graph(scored, rows, slots))
        x = x_next
    return Chain(befores, afters, log_probs, x, tuple(graphs), spread)


def step_noise(noise: Noise, purpose: str, address: Tensor, at: Tensor, like: Tensor) -> Tensor:
    """[b, *L] as ``like``: what rows of these addresses [b, 3] draw in the steps ``at`` [b], each in its own."""
    address, at, z = address.cpu(), at.cpu(), torch.empty_like(like)
    for k in range(int(at.min()), int(at.max()) + 1):  # groups have windows of their own
        rows = at == k
        drawn = noise.normal(f"{purpose}/step", address[rows], k, tuple(like.shape[1:]))
        z[rows.to(like.device)] = drawn.to(like)
    return z


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x at that precision, in its own dtype; contiguous, as replay has it, since layouts are part of a net's bits."""
    return (x if dtype is None else x.to(dtype).to(x.dtype)).contiguous()


def in_micro_batches(compute: Callable[[Tensor], T], num_rows: int, micro_batch: int) -> list[tuple[T, int]]:
    """compute(rows [micro_batch]) for all rows, the tail padded with its last row; with each, how many rows are real.

    A fixed shape is part of the numbers: the same rows in a batch of another size give other bits.
    """
    results: list[tuple[T, int]] = []
    for start in range(0, num_rows, micro_batch):
        rows = torch.arange(start, start + micro_batch).clamp(max=num_rows - 1)
        results.append((compute(rows), min(micro_batch, num_rows - start)))
    return results


def _step(
    x: Tensor,
    prediction: Prediction,
    schedule: Schedule,
    k: int,
    stochastic: Tensor,
    history: History | None,
    kernel: Callable[[Tensor, Prediction, Level, Level], Gaussian],
    solver: Solver,
    noise: Callable[[int], Tensor],
) -> tuple[Gaussian | None, Tensor, History | None]:
    """One step of all rows: kernel where stochastic [B], solver elsewhere. No Gaussian when no row is stochastic."""
    if stochastic.all():
        gaussian = kernel(x, prediction, *_row_levels(schedule, k, x))
        return gaussian, gaussian.sample(noise(k).to(x)), None
    x_solved, history = solver(x, prediction, schedule.level(k, x), schedule.level(k + 1, x), history)
    if not stochastic.any():
        return None, x_solved, history
    rows = stochastic.reshape(-1, *[1] * (x.ndim - 1)).to(x.device)
    gaussian = kernel(x, prediction, *_row_levels(schedule, k, x))
    return gaussian, torch.where(rows, gaussian.sample(noise(k).to(x)), x_solved), restart(history, rows)


def _room_for_gaussians(states: Tensor) -> Gaussian:
    """One for each of the states [B, K, *L]."""
    num_rows, num_kept, *latent = states.shape
    return Gaussian(torch.empty_like(states), states.new_empty(num_rows, num_kept, *[1] * len(latent)))


def _row_levels(schedule: Schedule, k: int, x: Tensor) -> tuple[Level, Level]:
    """Levels of step k, a row each [B, 1, ...], the form in which replay meets rows of different steps."""
    at = torch.full((len(x),), k)
    return schedule.level(at, x), schedule.level(at + 1, x)


def _check(x: Tensor, schedule: Schedule, stochastic: Tensor, kept: Tensor) -> None:
    if stochastic.shape != (len(x), schedule.num_steps):
        raise ValueError(f"stochastic is {list(stochastic.shape)}, not [{len(x)}, {schedule.num_steps}]")
    if kept.ndim != 2 or len(kept) != len(x):
        raise ValueError(f"kept is {list(kept.shape)}, not [{len(x)}, K]")
    if not stochastic.gather(1, kept).all():
        raise ValueError("only stochastic steps can be kept: a deterministic one has no density")
