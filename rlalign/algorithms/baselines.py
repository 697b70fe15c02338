"""What rewards are compared with over several batches: a prompt's past, and what its states say of them.

Tracker      A = (r - mean) / (std + 1e-6) over the prompt's last rewards, the present ones among them         DDPO
Values       A = r - V(c), V(c) <- V(c) + rate (mean of the group - V(c)) after each batch                     DPOK
StateValue   V(y_k), of what a prompt's value leaves:  A_k = r - V(c) - V(y_k)                                 DPOK
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d, pad

from rlalign.algorithms.advantages import loo
from rlalign.types import Trajectory

DELTA = 1e-6  # of DDPO's code
BLOCKS = 16  # of neighbouring elements that a state is summed up by: the channels of the latents of SD3 and FLUX
RIDGE = 1e-3


class Tracker:
    """The last rewards of every prompt."""

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size, self.min_count = buffer_size, min_count
        self.rewards: dict[str, list[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards: Tensor, valid: Tensor) -> Tensor:
        """(r - mean) / (std + δ) [P, G]: the rewards enter the buffers first, then mean and std are taken."""
        for prompt, row, real in zip(prompts, rewards, valid, strict=True):
            new = [float(reward) for reward in row[real]]
            self.rewards[prompt] = [*self.rewards.get(prompt, []), *new][-self.buffer_size :]
        whole = rewards[valid]
        histories = [rewards.new_tensor(self.rewards[prompt]) for prompt in prompts]
        used = [history if len(history) >= self.min_count else whole for history in histories]
        normalized = [normalize(row, of) for row, of in zip(rewards, used, strict=True)]
        return torch.where(valid, torch.stack(normalized), 0)


def normalize(rewards: Tensor, history: Tensor) -> Tensor:
    """(r - mean) / (std + δ), population std."""
    if len(history) == 0:
        return torch.zeros_like(rewards)
    equal = history.max() == history.min()  # their mean may differ from them in the last bit
    mean = history[0] if equal else history.mean()
    return (rewards - mean) / (history.std(correction=0) * ~equal + DELTA)


class Values:
    """V(c): one number a prompt, by regression on its rewards."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.values: dict[str, float] = {}

    def advantages(self, prompts: Sequence[str], rewards: Tensor, valid: Tensor) -> Tensor:
        """r - V(c) [P, G], V from before these rewards, which would else be their own baseline; then V moves."""
        known = torch.tensor([[prompt in self.values] for prompt in prompts])
        values = rewards.new_tensor([[self.values.get(prompt, 0.0)] for prompt in prompts])
        advantages = torch.where(known, rewards - values, loo(rewards, valid))
        for prompt, row, real in zip(prompts, rewards, valid, strict=True):
            if real.any():
                mean = float(row[real].mean())
                before = self.values.get(prompt, mean)
                self.values[prompt] = before + self.rate * (mean - before)
        return torch.where(valid, advantages, 0)


class StateValue:
    """V(y_k) = w_k φ(y_k), a ridge regression for each step of the chain, on the rewards of the batches before.

        φ(y) = 1, means of y and of y² over 16 blocks of neighbouring elements      F numbers, 33 but for tiny latents
        S_k <- (1 - rate) S_k + Σ φ φᵀ          m_k <- (1 - rate) m_k + Σ φ (r - V(c))
        w_k = (S_k / n_k + λ I)⁻¹ m_k / n_k     n_k = how many are summed up, λ = 1e-3

    The steps' sums [N, F, F + 1], S with m as its last column, are all that it remembers.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.load(torch.zeros(0, 1, 2))

    def __call__(self, sample: Trajectory, slot: int) -> Tensor:
        """[b] of the states before kept step ``slot``; 0 for steps that it has never seen."""
        at, features = sample.steps[:, slot].cpu(), pooled(sample.x[:, slot])
        known = at < len(self.weights)
        if not known.any():
            return torch.zeros_like(features[:, 0])
        weights = torch.where(known[:, None], self.weights[at.clamp(max=len(self.weights) - 1)], 0)
        return (features * weights.to(features)).sum(1)

    def counted(self, sample: Trajectory, residual: Tensor) -> Tensor:
        """[N, F, F + 1] on the CPU: what these rows add to the sums; residual = r - V(c) [b]."""
        total: Tensor | None = None
        for slot, x in enumerate(sample.x.unbind(1)):
            features = pooled(x).cpu()  # index_add_ of a GPU adds in no fixed order
            told = torch.cat([features, residual.to(features)[:, None]], 1)
            rows = features[:, :, None] * told[:, None]  # [b, F, F + 1]
            total = rows.new_zeros(sample.schedule.num_steps, *rows.shape[1:]) if total is None else total
            total.index_add_(0, sample.steps[:, slot].cpu(), rows)
        assert total is not None
        return total

    def fit(self, counted: Tensor) -> None:
        """The sums of a batch, of all ranks together, join those of the batches before."""
        new, old = counted.cpu(), self.sums if len(self.sums) else counted.cpu()[:0]
        steps = max(len(old), len(new))
        self.load((1 - self.rate) * _grown(old, steps) + _grown(new, steps))

    def load(self, sums: Tensor) -> None:
        self.sums, self.weights = sums, solved(sums)


def pooled(y: Tensor) -> Tensor:
    """φ [b, F] of latents [b, *L]."""
    rows = y.flatten(1)
    means = adaptive_avg_pool1d(torch.stack([rows, rows.square()], 1), min(BLOCKS, rows.shape[1]))
    return pad(means.flatten(1), (1, 0), value=1.0)


def solved(sums: Tensor) -> Tensor:
    """w [N, F], 0 for steps of which nothing is known."""
    number = sums[:, :1, :1]
    means = sums.double() / number.clamp(min=1e-12)
    ridge = RIDGE * torch.eye(sums.shape[1], dtype=torch.float64)
    inverse = (means[..., :-1] + ridge).inverse()
    return (inverse @ means[..., -1:])[..., 0]


def _grown(sums: Tensor, steps: int) -> Tensor:
    return pad(sums, (0, 0, 0, 0, 0, steps - len(sums)))
