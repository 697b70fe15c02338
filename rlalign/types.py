"""Frozen values that travel between the parts.

Shape letters, used everywhere:
    P prompts · G samples per prompt · B = P*G rows, ordered by prompt: row b belongs to prompt b // G
    N denoising steps · K stochastic (kept) steps · *L latent axes (C,H,W | C,F,H,W | tokens,C)
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

Cond = dict[str, Tensor]
"""Encoded prompts by the family's own names; every tensor is [P, ...]."""

Encoded = tuple[Cond, Cond | None]
"""What prompts are encoded to, and what they are guided away from."""

Role = Literal["train", "monitor", "heldout"]
"""What a reward is for: advantages, curves only, or never anything but evaluation."""


class Size(NamedTuple):
    """Pixels of the decoded sample; frames = 1 is an image."""

    height: int
    width: int
    frames: int = 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the user asks for; ``metadata`` is for rewards (GenEval's tag and include, the text to render ...)."""

    text: str
    negative: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    image: Tensor | None = None  # [3, H, W] uint8, what the sample is made from; of the size of the sample
    video: Tensor | None = None  # [F, 3, H, W] uint8
    files: Mapping[str, Any] = field(default_factory=dict[str, Any])  # that "image" and "video" (frames) are read from

    @property
    def title(self) -> str:
        """What tells it from other prompts, for people and for statistics: the text, and what it is made from."""
        return " ".join([self.text, *(f"[{name}]" for name in self.files.values())])


@dataclass(frozen=True, slots=True)
class Level:
    """One noise level of a chain, ``x = alpha * x0 + sigma * eps``, shaped to broadcast against latents."""

    alpha: Tensor  # [] or [B, 1, ...]
    sigma: Tensor  # [] or [B, 1, ...]
    interior: Tensor  # []  sigma_1 of the schedule: what Flow-SDE puts in place of sigma = 1


@dataclass(frozen=True, slots=True)
class Schedule:
    """The points of a chain from noise (row 0) to sample (row N), made once and never recomputed."""

    alpha: Tensor  # [N+1] float32 or float64
    sigma: Tensor  # [N+1] float32 or float64, falling
    time: Tensor  # [N+1] float32   what the network is told
    table: Tensor | None = None  # [T] float64   alpha of the training times; None: the flow path, alpha = 1 - sigma

    @property
    def num_steps(self) -> int:
        return self.sigma.shape[0] - 1

    def level(self, point: int | Tensor, like: Tensor) -> Level:
        """The level at ``point`` (an index, or one index a row [B]), ready to broadcast against ``like`` [B, *L]."""
        index = torch.as_tensor(point, device=self.sigma.device)
        shape = (-1, *[1] * (like.ndim - 1)) if index.ndim else ()
        alpha, sigma = self.alpha[index].reshape(shape), self.sigma[index].reshape(shape)
        return Level(alpha.to(like), sigma.to(like), self.sigma[1].to(like))

    @property
    def is_flow(self) -> bool:
        """Whether the points lie on the flow path."""
        return torch.allclose(self.alpha + self.sigma, torch.ones_like(self.sigma), atol=1e-4)

    @property
    def flow_grid(self) -> Tensor:
        """[N] the flow times of all points but the last, t = sigma / (alpha + sigma); with a table, of its closest."""
        if self.table is None:
            return self.sigma[:-1]
        return self.flow_times[self._closest((self.sigma / (self.alpha + self.sigma))[:-1])]

    @property
    def flow_times(self) -> Tensor:
        """[T] float64, rising: those of the training times."""
        assert self.table is not None
        sigma = (1 - self.table.square()).sqrt()
        return sigma / (self.table + sigma)

    def between(self, t: Tensor, like: Tensor) -> tuple[Level, Tensor]:
        """The level as noisy as flow times t [b], to broadcast against ``like`` [b, *L], and what the net is told [b].

        With a table that is a training time's, at which the flow path's x is (alpha + sigma) times smaller.
        """
        shape, interior = (-1, *[1] * (like.ndim - 1)), self.sigma[1].to(like.device)
        if self.table is not None:
            index = self._closest(t)
            alpha = self.table[index].reshape(shape)
            return Level(alpha.to(like), (1 - alpha.square()).sqrt().to(like), interior), index.to(t.device).float()
        assert self.is_flow, "levels of another path, and no table"
        sigma = t.to(like.dtype).reshape(shape)
        return Level(1 - sigma, sigma, interior), 1000 * t.float()

    def _closest(self, t: Tensor) -> Tensor:
        """int64: the training times whose flow times are closest to t [b], on the table's device."""
        times = self.flow_times
        return torch.bucketize(t.to(times), (times[1:] + times[:-1]) / 2)


@dataclass(frozen=True, slots=True)
class Graph:
    """Log-probs of one step of one micro-batch, kept in the rollout with the graph of that step alone."""

    log_probs: Tensor  # [n] with graph
    rows: Tensor  # [n] int64   of the batch
    slots: Tensor  # [n] int64   among the kept steps of each row

    def placed(self, before: int, count: int) -> "Graph":
        """In a batch, after so many rows of others; of its own rows only the first ``count``, the rest is padding."""
        real = self.rows < count
        with torch.enable_grad():
            return Graph(self.log_probs[real], self.rows[real] + before, self.slots[real])


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What a learner needs of rollouts, exactly as the sampler held it."""

    cond: Cond  # each [P, ...]
    uncond: Cond | None  # each [P, ...]   what replay needs for guidance
    schedule: Schedule  # [N+1]
    steps: Tensor  # [P, K] int64   which steps were stochastic and are kept; K = 0 for forward-process algorithms
    x: Tensor  # [B, K, *L]   state before each kept step, after rounding
    x_next: Tensor  # [B, K, *L]   state after each kept step, after rounding
    log_probs: Tensor  # [B, K] float32   under the weights that sampled
    final: Tensor  # [B, *L]   clean latent
    version: Tensor  # [B] int64   which weights sampled the row
    address: Tensor  # [B, 3] int64   (step, group, sample): seeds are addresses
    prompts: tuple[Prompt, ...] = ()  # P   for algorithms that differentiate rewards
    graphs: tuple[Graph, ...] = ()  # with `rollout.retain`, never between processes
    held: Tensor | None = None  # [B]   what a penalty is multiplied by in each row, set by the learner; None: 1

    @property
    def num_rows(self) -> int:
        return self.final.shape[0]

    @property
    def num_kept(self) -> int:
        return self.steps.shape[1]

    def take(self, rows: Tensor) -> "Trajectory":
        """Those rows [b] as a trajectory of its own in which every row is its own prompt (P = B = b)."""
        prompts = rows // (self.num_rows // self.steps.shape[0])
        per_row = ("x", "x_next", "log_probs", "final", "version", "address")
        return replace(
            self,
            cond={name: value[prompts] for name, value in self.cond.items()},
            uncond=None if self.uncond is None else {name: value[prompts] for name, value in self.uncond.items()},
            steps=self.steps[prompts],
            prompts=tuple(self.prompts[int(prompt)] for prompt in prompts) if self.prompts else (),
            graphs=(),
            held=None if self.held is None else self.held[rows],
            **{name: getattr(self, name)[rows] for name in per_row},
        )

    def to(self, device: torch.device | str) -> "Trajectory":
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})

    @staticmethod
    def concat(parts: "Sequence[Trajectory]") -> "Trajectory":
        """Trajectories of one schedule, one after the other."""
        first = parts[0]
        joined = ("steps", "x", "x_next", "log_probs", "final", "version", "address")
        return replace(
            first,
            cond=_joined([part.cond for part in parts]),
            uncond=None if first.uncond is None else _joined([part.uncond or {} for part in parts]),
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            graphs=joined_graphs([(part.graphs, part.num_rows) for part in parts]),
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in joined},
        )


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of work that one sampler and one scorer do alone: all samples of some whole groups of a step."""

    step: int
    groups: tuple[int, ...]  # the slots 0..P-1 of the batch that these prompts stand in
    prompts: tuple[Prompt, ...]
    samples: int  # G
    purpose: str = "rollout"  # part of every noise address: evaluation never draws a rollout's noise


@dataclass(frozen=True, slots=True)
class Span:
    """One call that a worker made."""

    worker: str  # "sampler-0"
    method: str
    start: float  # seconds since the epoch, by the worker's clock
    end: float  # the wait for arguments not counted
    step: int | None = None  # of the unit, for calls that work on one
    groups: tuple[int, ...] = ()  # of the unit


@dataclass(frozen=True, slots=True)
class RewardScores:
    """One reward's word on a batch. Where ``valid`` is False the value is 0 and means nothing."""

    values: Tensor  # [P, G] float32
    valid: Tensor  # [P, G] bool
    role: Role
    weight: float
    details: dict[str, Tensor] = field(default_factory=dict[str, Tensor])  # each [P, G], NaN = not applicable; log only


@dataclass(frozen=True, slots=True)
class Scores:
    """All rewards of a batch, by name: the only data about samples that the driver holds."""

    rewards: dict[str, RewardScores]
    prompts: tuple[str, ...] = ()  # P texts, for running per-prompt baselines
    distance: Tensor | None = None  # [P]   mean pairwise RMS pixel distance within each group
    nearest: Tensor | None = None  # [P, G]   RMS pixel distance to the closest other sample of the group
    stats: Mapping[str, float] = field(default_factory=dict[str, float])  # seconds and failures of each reward

    @property
    def training(self) -> dict[str, RewardScores]:
        return {name: reward for name, reward in self.rewards.items() if reward.role == "train"}

    @property
    def valid(self) -> Tensor:
        """[P, G] bool: every training reward gave a number."""
        return torch.stack([reward.valid for reward in self.training.values()]).all(0)

    @property
    def total(self) -> Tensor:
        """[P, G] float32: weighted sum of the training rewards, 0 where invalid."""
        weighted = torch.stack([reward.weight * reward.values for reward in self.training.values()])
        return weighted.sum(0) * self.valid

    @staticmethod
    def concat(parts: "Sequence[Scores]") -> "Scores":
        """Scores of consecutive groups, one after the other."""
        stats: Counter[str] = Counter()
        nearest = [part.nearest for part in parts if part.nearest is not None]
        for part in parts:
            stats.update(part.stats)  # pyright: ignore[reportArgumentType]  # typeshed counts whole things only
        return Scores(
            rewards={name: _stacked([part.rewards[name] for part in parts]) for name in parts[0].rewards},
            prompts=tuple(text for part in parts for text in part.prompts),
            distance=torch.cat([part.distance for part in parts if part.distance is not None]),
            nearest=torch.cat(nearest) if nearest else None,
            stats=stats,
        )


@dataclass(frozen=True, slots=True)
class State:
    """What a part must remember between runs: tensors for safetensors, plain values for JSON."""

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    values: dict[str, Any] = field(default_factory=dict[str, Any])

    def part(self, name: str) -> "State":
        """The state that was put under ``name`` by ``State.join``."""
        prefix = f"{name}/"
        tensors = {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}
        return State(tensors, self.values.get(name, {}))

    @staticmethod
    def join(parts: "Mapping[str, State]") -> "State":
        tensors = {f"{name}/{key}": t for name, part in parts.items() for key, t in part.tensors.items()}
        return State(tensors, {name: part.values for name, part in parts.items()})


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: tensor.to(device) for name, tensor in cast(Cond, value).items()}
    return value  # the schedule stays on the CPU; its levels move when they meet latents


def joined_graphs(parts: Sequence[tuple[Sequence[Graph], int]]) -> tuple[Graph, ...]:
    """Of consecutive parts of a batch, each with its number of rows."""
    before = accumulate((count for _, count in parts), initial=0)
    return tuple(
        graph.placed(start, count) for (graphs, count), start in zip(parts, before, strict=False) for graph in graphs
    )


def _joined(parts: Sequence[Cond]) -> Cond:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _stacked(parts: Sequence[RewardScores]) -> RewardScores:
    names = {name: None for part in parts for name in part.details}  # a dict keeps the order
    return RewardScores(
        values=torch.cat([part.values for part in parts]),
        valid=torch.cat([part.valid for part in parts]),
        role=parts[0].role,
        weight=parts[0].weight,
        details={
            name: torch.cat([part.details.get(name, torch.full_like(part.values, torch.nan)) for part in parts])
            for name in names
        },
    )
