"""The learner: trajectories and advantages -> updated weights."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from rlalign import checkpoint
from rlalign.algorithms.base import Algorithm, Fitting
from rlalign.algorithms.regularise import Regulariser, weight_of
from rlalign.checkpoint import LEARNER, Files
from rlalign.ema import power
from rlalign.mdp.noise import Noise
from rlalign.mdp.rollout import in_micro_batches
from rlalign.models.base import Unusable
from rlalign.policy import Policy
from rlalign.settings import Settings
from rlalign.sharding import gathered
from rlalign.types import State, Trajectory
from rlalign.workers.broadcast import Broadcast
from rlalign.workers.canary import Canary
from rlalign.workers.group import Group, sum_gradients
from rlalign.workers.optimizer import Optimizer, OptimizerConfig
from rlalign.workers.turn import Turn
from rlalign.workers.weights import Manifest, Memory, describe, join_in, pack


class EmaConfig(Settings):
    """A running average of the policy, for evaluation and export."""

    decay: float = Field(default=0.9, ge=0, lt=1)
    """Upper bound of the decay; it warms up as min((1 + n) / (10 + n), decay), n updates before this one."""
    every: int = Field(default=8, ge=1)
    """Optimizer steps between two updates of the average."""


class Diverged(ArithmeticError):
    """The gradient is NaN or infinite; the last checkpoint is still good."""


class Learner:
    """Plain class: owns the policy's weights, their optimizer and the copies (old, ema).

    With a ``group`` it is one rank of several, and everything it does all ranks have to do at the same time. Each takes
    its own share of a batch. Adapters are the same on every rank, whole nets are cut into parts (FSDP2).
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: Algorithm,
        noise: Noise,
        optimizer: OptimizerConfig,
        ema: EmaConfig | None,
        updates_per_step: int = 1,
        group: Group | None = None,
        epochs: int = 1,
    ) -> None:
        self.policy = policy
        self.group = group or Group()
        if self.group.size > 1 and not policy.lora:
            policy.shard(self.group.mesh())
        self.algorithm = algorithm
        self.noise = noise
        self.config = optimizer
        self.ema = ema
        self.updates_per_step, self.epochs = updates_per_step, epochs
        self.canary, self.memory, self.broadcast = Canary(policy, noise), Memory(), Broadcast()
        self.packed: list[Tensor] = []  # buckets of the last version, for the broadcast
        self.updates = 0
        self.num_weights = sum(parameter.numel() for parameter in policy.parameters.values())
        self.optimizer = Optimizer(optimizer, policy.parameters)
        self.turn = Turn(policy, self.optimizer)
        for name in algorithm.needs.copies:
            policy.keep(name)
        if ema:
            policy.keep("ema")
        self.regulariser = Regulariser(algorithm, policy)

    def update(
        self,
        trajectories: Sequence[Trajectory],
        advantages: Tensor,
        version: int,
        valid: Tensor | None = None,
        turns: Tensor | None = None,
        totals: Sequence[int] | None = None,
    ) -> dict[str, float]:
        """One step on a batch: advantages [P, G] in the order of the trajectories' groups. Returns metrics.

        [P, G, 2] are advantages and what the penalty counts for in each sample.
        ``version`` is that of the weights being updated; the rows bring their own. Rows that are not ``valid`` [P, G]
        bool, whose reward failed, are left out altogether.
        One rank of several is told its share: ``turns`` [P] int64, the optimizer step that each group belongs to, -1
        for groups of other ranks; and ``totals``, how many valid rows all ranks have together in each optimizer step.
        Metrics are those of all ranks, on every rank.
        """
        self.turn.take()
        batch = Trajectory.concat(trajectories)
        if advantages.ndim == 3:
            advantages, held = advantages.unbind(2)
            batch = replace(batch, held=held.flatten())
        num_prompts, samples = advantages.shape
        turns = turns_of(num_prompts, self.updates_per_step) if turns is None else turns
        mine = (turns >= 0).repeat_interleave(samples)
        metrics = Metrics()
        if mine.any():
            metrics.maxima["staleness"] = float(version - batch.version[mine].min())
        rows_of = [self._rows(turns == number, valid, samples) for number in range(self.updates_per_step)]
        for epoch, (number, rows) in product(range(self.epochs), enumerate(rows_of)):
            total = len(rows) if totals is None else totals[number]
            if total:
                self._optimizer_step(batch, rows, total, advantages.flatten(), metrics, first=epoch == number == 0)
        self._fit(batch, torch.cat(rows_of), advantages.flatten())
        reduced = Metrics.joined(self.group.gather(metrics)).reduced()
        moved = self.algorithm.after_step(self.policy, self.updates)
        return reduced | moved | self.regulariser.after_step(reduced.get("kl"))

    def _rows(self, groups: Tensor, valid: Tensor | None, samples: int) -> Tensor:
        """[b] the valid rows of those groups [P] bool."""
        rows = (groups.nonzero() * samples + torch.arange(samples)).flatten()
        return rows if valid is None else rows[valid.flatten()[rows]]

    def _fit(self, batch: Trajectory, rows: Tensor, advantages: Tensor) -> None:
        """What the algorithm learns beside the policy, from all ranks' rows."""
        if self.algorithm.needs.fits:
            assert isinstance(self.algorithm, Fitting)
            counted: Tensor | None = None
            for part in rows.split(self.policy.settings.micro_batch):
                own = self.algorithm.counted(batch.take(part).to(self.policy.device), advantages[part])
                counted = own if counted is None else counted + own
            assert counted is not None
            self.group.sum([counted])
            self.algorithm.fit(counted)

    @torch.no_grad()
    def drift(self, trajectories: Sequence[Trajectory]) -> float:
        """How far the policy is from the reference, on one micro-batch: ``kl`` where no penalty measures it anyway.

        Trajectories: KL of the kept steps, in the reduction of the run; else mean (v - v_ref)^2 half way to the noise.
        """
        self.turn.take()
        batch = trajectories[0]
        rows = torch.arange(self.policy.settings.micro_batch).clamp(max=batch.num_rows - 1)
        sample = batch.take(rows).to(self.policy.device)
        if not sample.num_kept:
            x0, half = sample.final, torch.full((len(rows),), 0.5, device=sample.final.device)
            noise = self.noise.normal("drift", sample.address, 0, tuple(x0.shape[1:])).to(x0)
            with self.policy.using("reference"):
                reference = self.policy.predict_noised(sample, (x0 + noise) / 2, half).velocity
            velocity = self.policy.predict_noised(sample, (x0 + noise) / 2, half).velocity
            return float((velocity - reference).square().mean())
        with self.policy.using("reference"):
            references = [self.policy.replay(sample, slot).gaussian for slot in range(sample.num_kept)]
        gaussians = [self.policy.replay(sample, slot).gaussian for slot in range(sample.num_kept)]
        reduction = self.policy.settings.logprob_reduction
        pairs = zip(gaussians, references, strict=True)
        return float(torch.stack([own.kl(other, reduction) for own, other in pairs]).mean())

    def _optimizer_step(
        self, batch: Trajectory, rows: Tensor, total: int, advantages: Tensor, metrics: "Metrics", first: bool
    ) -> None:
        if batch.graphs:  # gradients go as far as the log-probs, and from there through what the rollout kept
            batch = replace(batch, log_probs=batch.log_probs.clone().requires_grad_())
        visited, before = 0.0, metrics.weights["kl"]
        for micro, weight in self._passes(batch, rows, advantages):
            visited += float(weight.sum())
            sample = batch.take(micro).to(self.policy.device)
            for loss in self.algorithm.losses(
                self.policy, sample, advantages[micro].to(self.policy.device), self.noise
            ):
                if not loss.rows.requires_grad:
                    raise Unusable(
                        "the loss of some samples depends on no weight that trains: name all nets in model.train, or "
                        "keep rollout.window.range to the steps of the one that trains"
                    )
                (loss.rows * weight).sum().div(total).backward(retain_graph=bool(batch.graphs))
                metrics.add(loss.means, loss.maxima if first else {}, weight)
        if visited:  # rows that were left out feel no penalty, which is how they count
            metrics.weights["kl"] += (metrics.weights["kl"] - before) * (len(rows) / visited - 1)
        for graph in batch.graphs:
            assert batch.log_probs.grad is not None
            graph.log_probs.backward(batch.log_probs.grad[graph.rows, graph.slots])
        norm = self._apply_gradient()
        metrics.note("grad_norm", norm)
        metrics.note("grad_rms", norm / self.num_weights**0.5)

    def _passes(self, batch: Trajectory, rows: Tensor, advantages: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The micro-batches; where weights are sharded as many on every rank, since a pass gathers parts from all."""
        if not self.policy.sharded:
            yield from self._micro_batches(batch, rows, advantages)
            return
        own = list(self._micro_batches(batch, rows, advantages))
        most = max(self.group.gather(len(own)))
        size = self.policy.settings.micro_batch
        idle = torch.arange(size).clamp(max=batch.num_rows - 1), torch.zeros(size, device=self.policy.device)
        yield from own + [idle] * (most - len(own))

    def _micro_batches(self, batch: Trajectory, rows: Tensor, advantages: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows [micro_batch] with their weights (0 = padding). Rows without signal stand together and go unvisited."""
        if self.algorithm.needs.whole_groups:
            yield from self._whole_groups(batch, rows, advantages)
            return
        if self.algorithm.needs.silent_zero and not batch.graphs:
            silent = self._silent(batch, rows, advantages)
            rows = torch.cat([rows[~silent], rows[silent]])
            size = self.policy.settings.micro_batch
            rows = rows[: max(size, math.ceil(int((~silent).sum()) / size) * size)]
        size = self.policy.settings.micro_batch
        for places, real in in_micro_batches(lambda places: places, len(rows), size):
            yield rows[places], (torch.arange(size) < real).float().to(self.policy.device)

    def _silent(self, batch: Trajectory, rows: Tensor, advantages: Tensor) -> Tensor:
        """[b] bool: rows of advantage 0 that no penalty holds."""
        held = torch.full_like(advantages, weight_of(self.algorithm)) if batch.held is None else batch.held
        return (advantages[rows] == 0) & (held[rows] == 0)

    def _whole_groups(self, batch: Trajectory, rows: Tensor, advantages: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """As many whole groups as fit into a micro-batch, at least one; none is padded, which would change its sums."""
        silent = self._silent(batch, rows, advantages)
        if self.algorithm.needs.silent_zero and not silent.all():
            rows = rows[~silent]
        _, sizes = batch.address[rows, :2].unique_consecutive(dim=0, return_counts=True)
        part: list[Tensor] = []
        for group in [*rows.split(sizes.tolist()), None]:
            held = sum(map(len, part))
            if part and (group is None or held + len(group) > self.policy.settings.micro_batch):
                yield torch.cat(part), torch.ones(held, device=self.policy.device)
                part = []
            if group is not None:
                part.append(group)

    def _apply_gradient(self) -> float:
        if self.group.size > 1 and not self.policy.sharded:  # FSDP2 summed its own during the backward passes
            sum_gradients(self.group, list(self.policy.parameters.values()))
        parameters = self.optimizer.with_gradients()
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        total = gathered(total) if self.policy.sharded else total
        torch.nn.utils.clip_grads_with_norm_(parameters, self.config.max_grad_norm, total)
        norm = float(total)
        if not math.isfinite(norm):
            raise Diverged(f"the gradient norm of update {self.updates} is {norm}; the weights were not changed")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        if self.ema and self.updates % self.ema.every == 0:
            self.policy.blend("ema", power(self.updates - 1, self.ema.decay))
        return norm

    def publish(
        self, version: int, names: Sequence[str], send: bool = True, canary: bool = False, due: bool = True
    ) -> tuple[Manifest, list[Tensor]]:
        """The weights under these names as version ``version``: a manifest, and copies that no later update reaches.

        Not to ``send`` is for samplers that share this network: nothing is copied. ``canary``: with a prediction, for
        everybody if that is ``due``. All ranks have to call; rank 0 alone answers.
        """
        self.turn.take()
        predicted = self.canary.predict(self.algorithm.sample_with) if canary else None
        variants = {name: self.policy.weights(name) for name in names}
        if not send:
            return describe(version, variants), []
        if self.group.rank > 0:
            if self.policy.sharded:
                join_in(variants, gathered)
            return Manifest(version), []
        self.packed = []
        whole = gathered if self.policy.sharded else None
        manifest, buckets = pack(version, variants, self.memory, predicted, due, whole=whole)
        if self.broadcast.generation:
            self.packed = buckets
        return manifest, buckets

    def rest(self) -> None:
        """Makes room on a GPU that it shares; the next call that computes comes back."""
        self.turn.leave()

    def generation(self) -> int:
        """Of the broadcast group that it is in; this and the next two are called beside its other work."""
        return self.broadcast.generation

    def join(self, address: tuple[str, int], generation: int, size: int, timeout_s: float) -> int:
        if self.group.rank > 0:
            return 0
        return self.broadcast.join(address, generation, size, timeout_s, root=True)

    def exchange(self, generation: int, manifest: Manifest) -> int:
        """Sends the version that was published last."""
        if self.group.rank > 0:
            return 0
        return self.broadcast.send(generation, manifest, self.packed)

    def state_dict(self) -> State:
        """Everything that the next update depends on, as copies on the CPU."""
        return State({key: t.detach().cpu().clone() for key, t in self._tensors().items()}, self._values())

    def load_state_dict(self, state: State) -> None:
        self.updates = state.values["updates"]
        self.regulariser.load(state.values.get("regulariser", {}))
        for name in ("policy", *(name for name in self.policy.copies if name != "reference")):
            self.policy.load(name, state.part(name).tensors)
        if self.algorithm.needs.fits:
            assert isinstance(self.algorithm, Fitting)
            self.algorithm.load_fitted(state.tensors["fitted/sums"])
        self.optimizer.load(state.part("master").tensors, state.part("optimizer").tensors)

    def save(self, folder: Path) -> Files:
        """Writes this rank's files of a checkpoint: its parts of sharded weights; else rank 0 writes everything."""
        state = State(self._tensors(), self._values())
        if self.policy.sharded:
            return checkpoint.write_sharded(folder, LEARNER, state, self.group.rank)
        return checkpoint.write_part(folder, LEARNER, state) if self.group.rank == 0 else {}

    def load(self, folder: Path) -> None:
        """Takes over a checkpoint that is known to be sound, however many ranks wrote it."""
        like: dict[str, Tensor] = {}
        if self.policy.sharded:
            like = self.optimizer.like()
            for key, parameter in self.policy.parameters.items():
                like |= {f"{name}/{key}": parameter.data for name in ("policy", *self.policy.copies)}
        self.load_state_dict(checkpoint.read_part(folder, LEARNER, like))

    def _values(self) -> dict[str, Any]:
        regulariser = self.regulariser.state()
        return {"updates": self.updates, **({"regulariser": regulariser} if regulariser else {})}

    def _tensors(self) -> dict[str, Tensor]:
        names = ["policy", *(name for name in self.policy.copies if name != "reference")]
        tensors = {f"{name}/{key}": t for name in names for key, t in self.policy.weights(name).items()}
        if self.algorithm.needs.fits:
            assert isinstance(self.algorithm, Fitting)
            tensors["fitted/sums"] = self.algorithm.fitted
        return tensors | self.optimizer.tensors()


def turns_of(num_groups: int, updates: int) -> Tensor:
    """[P] int64: which of the optimizer steps each group belongs to, in equal shares of neighbours."""
    shares = torch.arange(num_groups).tensor_split(updates)
    return torch.cat([torch.full_like(share, number) for number, share in enumerate(shares)])


class Metrics:
    """Sums over rows on their way to means, and maxima."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.weights: dict[str, float] = defaultdict(float)
        self.maxima: dict[str, float] = {}

    def add(self, means: dict[str, Tensor], maxima: dict[str, Tensor], weight: Tensor) -> None:
        """Tensors are [b]; rows of weight 0 do not count."""
        if not weight.any():
            return
        for name, values in means.items():
            self.sums[name] += float((values.detach() * weight).sum())
            self.weights[name] += float(weight.sum())
        for name, values in maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -math.inf), float(values.detach()[weight > 0].max()))

    def note(self, name: str, value: float) -> None:
        self.sums[name] += value
        self.weights[name] += 1

    @staticmethod
    def joined(parts: "Sequence[Metrics]") -> "Metrics":
        """Of all ranks together."""
        whole = Metrics()
        for part in parts:
            for name, total in part.sums.items():
                whole.sums[name] += total
                whole.weights[name] += part.weights[name]
            for name, value in part.maxima.items():
                whole.maxima[name] = max(whole.maxima.get(name, -math.inf), value)
        return whole

    def reduced(self) -> dict[str, float]:
        return {name: total / self.weights[name] for name, total in self.sums.items()} | self.maxima
