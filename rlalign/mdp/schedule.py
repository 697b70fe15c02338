"""Tables of noise levels, made once in float64, and the moving window of stochastic steps."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlalign.types import Schedule


def shift(u: Tensor, s: float) -> Tensor:
    """Time shift of arXiv 2403.03206: s u/(1 + (s - 1) u). s = 1 is the identity, s = e^mu FLUX's dynamic shift."""
    return s * u / (1 + (s - 1) * u)


def plain_sigmas(num_steps: int, s: float) -> Tensor:
    """sigma_k = shift(1 - k/N, s), the grid of DanceGRPO and MixGRPO: [N+1]."""
    return shift(_line(1, 0, num_steps + 1), s)


def diffusers_static_sigmas(num_steps: int, s: float) -> Tensor:
    """diffusers' flow-matching Euler grid without dynamic shifting, hence Stable Diffusion 3: [N+1].

    u runs evenly from 1 to m = shift(1/1000, s); sigma = shift(u, s), then 0. The lower end is so shifted twice.
    """
    lowest = shift(torch.tensor(1 / 1000, dtype=torch.float64), s).item()
    return _ended(shift(_line(1, lowest, num_steps), s))


def diffusers_dynamic_sigmas(num_steps: int, mu: float) -> Tensor:
    """diffusers' grid with dynamic shifting, hence FLUX and Qwen-Image: u = 1..1/N, sigma = shift(u, e^mu), then 0."""
    return _ended(shift(_line(1, 1 / num_steps, num_steps), math.exp(mu)))


def dynamic_mu(
    tokens: int, base_shift: float = 0.5, max_shift: float = 1.15, base_tokens: int = 256, max_tokens: int = 4096
) -> float:
    """mu for so many packed tokens: the line through (base_tokens, base_shift) and (max_tokens, max_shift)."""
    return base_shift + (tokens - base_tokens) * (max_shift - base_shift) / (max_tokens - base_tokens)


def stretch_terminal(sigmas: Tensor, terminal: float) -> Tensor:
    """[N+1] with ``terminal`` as its last non-zero level: 1 - (1 - sigma)(1 - terminal)/(1 - sigma_{N-1})."""
    return _ended(1 - (1 - sigmas[:-1]) * (1 - terminal) / (1 - sigmas[-2]))


def compressed_tail_sigmas(num_steps: int, s: float, last: int, ratio: float) -> Tensor:
    """MixGRPO-Flash's grid, arXiv 2507.21802: plain up to step ``last``, the rest in fewer points.

    After sigma_last come n = int((N - last) ratio) points, shift of an even line from 1 - (last + 1)/N to 0.
    """
    count = int((num_steps - last) * ratio)
    if count < 2:
        raise ValueError(f"the compressed tail has {count} points and never reaches sigma 0: raise ratio above {ratio}")
    tail = shift(_line(1 - (last + 1) / num_steps, 0, count), s)
    return torch.cat([plain_sigmas(num_steps, s)[: last + 1], tail])


def flow_schedule(sigmas: Tensor, dtype: torch.dtype = torch.float32) -> Schedule:
    """The flow path: alpha = 1 - sigma, and the net is told 1000 sigma."""
    sigma = sigmas.to(dtype)
    return Schedule(1 - sigma, sigma, 1000 * sigma.float())


def scaled_linear_alphas_cumprod(num_times: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """abar_i = prod_{j<=i} (1 - beta_j) with even sqrt(beta) from first to last: Stable Diffusion 1 and XL. [T]"""
    betas = _line(math.sqrt(first), math.sqrt(last), num_times).square()
    return (1 - betas).cumprod(0)


def ddim_schedule(
    num_steps: int, alphas_cumprod: Tensor, offset: int = 1, dtype: torch.dtype = torch.float32
) -> Schedule:
    """DDIM's levels with "leading" spacing on a table [T]: times (T/N)(N-1-k) + offset, and the next one T/N lower.

    alpha = sqrt(abar), sigma = sqrt(1 - abar). The last time is clamped at 0, as ddpo-pytorch does.
    """
    stride = len(alphas_cumprod) // num_steps
    times = stride * torch.arange(num_steps - 1, -2, -1) + offset
    times = times.clamp(min=0, max=len(alphas_cumprod) - 1)
    level = alphas_cumprod[times].double()
    return Schedule(level.sqrt().to(dtype), (1 - level).sqrt().to(dtype), times.float())


def moving_window(
    iteration: int, size: int, num_steps: int, stride: int, hold: Callable[[int], int], roll_back: bool = False
) -> range:
    """MixGRPO's window of stochastic steps at an iteration, arXiv 2507.21802.

    It stays ``hold(start)`` iterations at a start and moves on by ``stride``; past the end it returns to 0 with
    roll_back and else stays on the last step. Steps beyond the end are cut off.
    """
    start = 0
    while iteration >= (stay := max(1, hold(start))):
        iteration -= stay
        start += stride
        if start >= num_steps:
            start = 0 if roll_back else num_steps - 1
            if not roll_back:
                break
    return range(start, min(start + size, num_steps))


def linear_hold(most: int, least: int, num_steps: int) -> Callable[[int], int]:
    """MixGRPO's ``decay``: from most to least iterations as the start goes from 0 to the end."""
    return lambda start: max(least, int(most * (1 - start / num_steps) + least * start / num_steps))


def exponential_hold(most: int, rate: float = 0.1, threshold: int = 13) -> Callable[[int], int]:
    """MixGRPO's ``exp_decay``: ceil(most exp(-rate max(0, start - threshold)))."""
    return lambda start: math.ceil(most * math.exp(-rate * max(0, start - threshold)))


def _line(first: float, last: float, count: int) -> Tensor:
    return torch.linspace(first, last, count, dtype=torch.float64)


def _ended(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])
