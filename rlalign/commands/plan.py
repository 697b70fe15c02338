"""plan: what a run file will do, and what it takes, before anything starts.

Passes of the network are counted, not derived: the run's own sampler and algorithm work on one row of a stand-in model
that costs nothing. Weights are counted from the headers of their files. What a step keeps in memory is measured on the
real model where that is small, or when asked for.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlalign import machine, plugins
from rlalign.algorithms.base import Algorithm
from rlalign.algorithms.regularise import penalty_of
from rlalign.build import load_policy, make_algorithm
from rlalign.checks import warnings
from rlalign.commands import split
from rlalign.commands.problems import in_preparation
from rlalign.commands.runs import config_of, is_run
from rlalign.config import RunConfig
from rlalign.mdp.noise import Noise
from rlalign.models import analytic, lora
from rlalign.models.base import torch_dtype
from rlalign.paths import model_path
from rlalign.pipeline import split as batch_units
from rlalign.policy import Policy
from rlalign.prompts import read, stand_in
from rlalign.reporting.spans import read_spans
from rlalign.rundir import RunDir
from rlalign.types import Prompt, Trajectory, Unit
from rlalign.workers.learner import Learner
from rlalign.workers.sampler import Sampler

SMALL = 2**28  # bytes of weights up to which the real model is loaded to measure
ROWS = 2  # of a pass of the net that is counted or measured; chains, where one makes several rows
DENOISERS = ("transformer", "unet")  # what diffusers calls the net that is trained


@dataclass(frozen=True, slots=True)
class Passes:
    """Rows that go through the network, for each image."""

    rollout: float
    trained: float  # forward and backward
    compared: float  # forward only: old policy, reference

    @property
    def learnt(self) -> float:
        """What an update costs, in forward passes: a backward one is worth two."""
        return 3 * self.trained + self.compared


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters of the whole model, and those that train."""

    all: int
    trained: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that one row keeps: for the backward pass of a micro-batch, and in the trajectories of a step."""

    activations: int
    trajectory: int


def plan(target: str, overrides: Sequence[str], measure: bool, gpus: int | None = None) -> int:
    with in_preparation():
        config = config_of(target, overrides)
        algorithm = make_algorithm(config)
        doubts = warnings(config)
        train, heldout = read(config.prompts, "train"), read(config.prompts, "heldout")
        weights = count_weights(config)
        small = weights is None or weights.all * _itemsize(config) <= SMALL
        policy = load_policy(config) if small or measure else None
    if weights is None:
        assert policy is not None
        weights = Weights(_size([p for net in policy.family.nets.values() for p in net.parameters()]), 0)
    if policy is not None:
        weights = Weights(weights.all, _size(policy.parameters.values()))
    kept = measure_kept(config, policy) if policy is not None else None
    passes = count_passes(config, algorithm)
    lines = [
        ("model", f"{config.model.family} {config.model.path}, {config.model.dtype}"),
        ("prompts", f"{len(train.prompts):,} to learn on, {len(heldout.prompts):,} held out"),
        ("rewards", ", ".join(f"{r.name} ({r.role}, weight {r.weight:g})" for r in config.rewards)),
        *_work(config, passes),
        *_split(config, target, passes, gpus),
        *_memory(config, algorithm, weights, kept),
    ]
    for name, words in lines:
        print(f"{name:12} {words}")
    for doubt in doubts:
        print(f"{'warning':12} {doubt}")
    return 0


# --- the work of a step


def _work(config: RunConfig, passes: Passes) -> Iterator[tuple[str, str]]:
    rollout, evaluation, updates = config.rollout, config.evaluation, config.updates_per_step
    images = rollout.prompts_per_step * rollout.samples_per_prompt
    batches = -(-images // rollout.micro_batch)
    padding = batches * rollout.micro_batch - images
    made = f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples = {images} images"
    shape = f"{' x '.join(map(str, rollout.size))} pixels, in {batches} micro-batches of {rollout.micro_batch}"
    yield "step", f"{made} of {shape}" + (f" ({padding} rows of padding)" if padding else "")
    yield "rollout", f"{passes.rollout:g} passes of the network an image, {passes.rollout * images:,.0f} a step"
    each = f"{passes.trained:g} passes with gradient and {passes.compared:g} without an image"
    learnt = (passes.trained + passes.compared) * images
    steps = f"{updates} optimizer step{'s' if updates > 1 else ''} of {images // updates} images"
    yield "update", f"{config.algorithm.name}, {steps}: {each}, {learnt:,.0f} a step"
    times = sum(evaluation.due(step, config.steps) for step in range(config.steps + 1))
    guided = 2 if evaluation.guidance_scale != 1 else 1
    judged = times * evaluation.num_images * evaluation.num_steps * guided
    yield "evaluation", f"{times} times {evaluation.num_images} images, {evaluation.num_steps} steps each"
    total = config.steps * (passes.rollout * images + learnt) + judged
    share = f"{total:,.0f} passes of the network, {judged / total:.0%} of them for evaluation"
    yield "in all", f"{config.steps} steps, {config.steps * images:,} images, {share}"


def _split(config: RunConfig, target: str, passes: Passes, gpus: int | None) -> Iterator[tuple[str, str]]:
    """How many of what, from a run's own times, or from the passes where there are none."""
    rollout = config.rollout
    images, groups = rollout.prompts_per_step * rollout.samples_per_prompt, rollout.prompts_per_step
    units = len(batch_units(0, (Prompt(""),) * groups, rollout.samples_per_prompt, rollout.micro_batch))
    spans = read_spans(RunDir(Path(target)).spans) if is_run(target) else []
    work = split.measured(spans, units, groups)
    yield "time", split.in_words(work) if work else split.estimated_in_words(passes.rollout, passes.learnt)
    work = work or split.Work(passes.rollout * images, 0.0, passes.learnt * images, units, groups)
    yield from zip(("split", "", ""), split.lines(work, config.runtime, _places(config, gpus)), strict=False)


def _places(config: RunConfig, gpus: int | None) -> split.Places:
    count = torch.cuda.device_count() if gpus is None else gpus
    if count:
        return split.Places(count, "GPU", config.runtime.gpus_per_scorer)
    return split.Places(max(2, (os.cpu_count() or 1) // config.runtime.threads_per_worker), "CPU", 1.0)


def count_passes(config: RunConfig, algorithm: Algorithm) -> Passes:
    """What the run's own sampler and losses ask of the network, on a stand-in of one dimension."""
    settings = config.rollout.model_copy(update={"size": (1, 1), "micro_batch": ROWS})
    family = analytic.Family.load(analytic.Config(), "", torch.float32, "cpu")
    policy = Policy(family, settings, lora.full(family.nets, ["velocity"]), lora=False)
    counts = {"with": 0, "without": 0}

    def count(net: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts["with" if torch.is_grad_enabled() else "without"] += len(inputs[0])

    family.net.register_forward_hook(count)
    sample = _sample(policy, algorithm, config)
    rollout, counts["without"] = 0 if settings.source == "data" else counts["without"], 0
    for _ in algorithm.losses(policy, sample, torch.ones(sample.num_rows), Noise(0)):
        pass
    rows = sample.num_rows
    return Passes(rollout / rows, counts["with"] / rows, counts["without"] / rows)


def _sample(policy: Policy, algorithm: Algorithm, config: RunConfig) -> Trajectory:
    """A micro-batch as the learner gets it."""
    noise = Noise(0)
    Learner(policy, algorithm, noise, config.optimizer, config.ema)  # keeps the copies that the losses need
    unit = Unit(0, (0,), (stand_in("a", policy.size),), ROWS * config.rollout.chain_rows)
    needs = algorithm.needs
    sampler = Sampler(policy, noise, algorithm.sample_with, needs.trajectory, shares=True, keep_uncond=needs.uncond)
    trajectory, _ = sampler.sample(unit, policy.settings if policy.settings.source == "data" else None)
    return trajectory.take(torch.arange(trajectory.num_rows))


# --- memory


def _memory(config: RunConfig, algorithm: Algorithm, weights: Weights, kept: Kept | None) -> Iterator[tuple[str, str]]:
    images = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    copies = len(algorithm.needs.copies) + (config.ema is not None) + (config.model.lora is None)
    copies += penalty_of(algorithm).moves
    frozen = weights.all * _itemsize(config)
    own = weights.trained * (4 + 4 + 8 + 4 * copies)  # weight, gradient, two moments, copies
    yield "weights", f"{weights.all:,} parameters, {weights.trained:,} trained ({_how(config)})"
    parts = {"weights": frozen, "training state": own}
    if kept is not None:
        parts["activations of a micro-batch"] = kept.activations * config.rollout.micro_batch
        parts["trajectories of a step"] = kept.trajectory * images
    total = sum(parts.values())
    yield "memory", f"about {_gib(total)}: " + ", ".join(f"{name} {_gib(part)}" for name, part in parts.items())
    if kept is None:
        yield "", "without activations and trajectories, which --measure finds by loading the model"
    available = _available()
    if total > available:
        yield "warning", f"that is more than the {_gib(available)} here; {_remedy(config, parts, kept, available)}"


def _how(config: RunConfig) -> str:
    return f"LoRA of rank {config.model.lora.rank}" if config.model.lora else "full fine-tuning"


def _remedy(config: RunConfig, parts: dict[str, int], kept: Kept | None, available: int) -> str:
    if kept is None:
        return "use LoRA, or a smaller dtype"
    fixed = sum(parts.values()) - kept.activations * config.rollout.micro_batch
    rows = (available - fixed) // max(1, kept.activations)
    if rows < 1:
        return "use LoRA, a smaller dtype, or fewer prompts_per_step"
    return f"lower rollout.micro_batch to {rows}"


def measure_kept(config: RunConfig, policy: Policy) -> Kept:
    """One micro-batch through the real model."""
    algorithm = make_algorithm(config)
    policy.settings = config.rollout.model_copy(update={"micro_batch": ROWS})
    sample = _sample(policy, algorithm, config)
    weights = {p.untyped_storage().data_ptr() for net in policy.family.nets.values() for p in net.parameters()}
    most = 0
    for bytes_kept in _saved_by_each_loss(policy, algorithm, sample, weights):
        most = max(most, bytes_kept)
    tensors = [t for t in (sample.x, sample.x_next, sample.final, *sample.cond.values()) if t is not None]
    return Kept(most // sample.num_rows, sum(t.nbytes for t in tensors) // sample.num_rows)


def _saved_by_each_loss(policy: Policy, algorithm: Algorithm, sample: Trajectory, weights: set[int]) -> Iterator[int]:
    """Bytes that autograd holds on to for the backward pass of each loss, weights not counted."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in algorithm.losses(policy, sample, torch.ones(sample.num_rows, device=policy.device), Noise(0)):
            yield sum(saved.values())
            saved.clear()


def _available() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return int(machine.hardware()["memory_gib"] * 2**30)


def count_weights(config: RunConfig) -> Weights | None:
    """From the headers of safetensors files; None where there are none, as for Hub ids that are not here."""
    folder = Path(model_path(config.model.path) or "/nowhere")
    shapes = {part.name: _headers(part) for part in folder.iterdir() if part.is_dir()} if folder.is_dir() else {}
    if not any(shapes.values()):
        return None
    total = sum(_numel(shape) for part in shapes.values() for shape in part.values())
    nets = config.model.train or [name for name in DENOISERS if name in shapes]
    layers = {name: shape for net in nets for name, shape in shapes.get(net, {}).items()}
    if config.model.lora is None:
        return Weights(total, sum(map(_numel, layers.values())))
    family = plugins.load("model", config.model.family).Family
    ends = tuple(f"{target}.weight" for target in config.model.lora.targets or family.lora_targets)
    adapted = [shape for name, shape in layers.items() if name.endswith(ends)]
    return Weights(total, sum(config.model.lora.rank * (shape[0] + _numel(shape[1:])) for shape in adapted))


def _headers(folder: Path) -> dict[str, list[int]]:
    """Shapes by name, of the files that the library would read."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if ".fp16." in path.name:
            continue  # the same weights once more
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _itemsize(config: RunConfig) -> int:
    return torch_dtype(config.model.dtype).itemsize


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
