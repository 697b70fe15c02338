"""plan: what a run file will do, and what it takes, before anything starts.

Passes of the network are counted, not derived: the run's own sampler and algorithm work on one row of a stand-in model
that costs nothing. Memory is memory.py's account. What a step keeps there is measured on the real model where that is
small, or when asked for.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rlalign.algorithms.base import Algorithm, epochs_of
from rlalign.build import load_policy, make_algorithm
from rlalign.checks import warnings
from rlalign.commands import fitting, split
from rlalign.commands.memory import Facts, Kept
from rlalign.commands.problems import in_preparation
from rlalign.commands.runs import config_of, is_run
from rlalign.config import RunConfig
from rlalign.mdp.noise import Noise
from rlalign.models import analytic, lora, sizes
from rlalign.models.base import torch_dtype
from rlalign.models.sizes import Model
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


def plan(
    target: str, overrides: Sequence[str], measure: bool, gpus: int | None = None, gpu_memory: float | None = None
) -> int:
    with in_preparation():
        config = config_of(target, overrides)
        algorithm = make_algorithm(config)
        doubts = warnings(config)
        train, heldout = read(config.prompts, "train"), read(config.prompts, "heldout")
        facts = Facts(config, model_of(config))
        if measure or _is_small(config, facts):
            policy = load_policy(config)
            facts = replace(facts, policy=policy, kept=measure_kept(config, policy))
    passes = count_passes(config, algorithm)
    lines = [
        ("model", f"{config.model.family} {config.model.path}, {config.model.dtype}"),
        ("prompts", f"{len(train.prompts):,} to learn on, {len(heldout.prompts):,} held out"),
        ("rewards", ", ".join(f"{r.name} ({r.role}, weight {r.weight:g})" for r in config.rewards)),
        *_work(config, passes),
        *_split(config, target, passes, gpus),
        *fitting.lines(facts, None if gpu_memory is None else gpu_memory * 2**30),
    ]
    for name, words in lines:
        print(f"{name:12} {words}")
    for doubt in doubts:
        print(f"{'warning':12} {doubt}")
    return 0


def _is_small(config: RunConfig, facts: Facts) -> bool:
    """Whether the model is at hand and loaded at once: with its weights, which a folder of configs has not."""
    if facts.model is None:
        return not config.model.path or Path(model_path(config.model.path)).is_dir()
    size = sum(facts.parts.values()) * torch_dtype(config.model.dtype).itemsize
    return size <= SMALL and not facts.model.unknown and facts.model.has_weights


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
    number = updates * epochs_of(config.algorithm)
    steps = f"{number} optimizer step{'s' if number > 1 else ''} of {images // updates} images"
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
    rows, epochs = sample.num_rows, epochs_of(config.algorithm)
    return Passes(rollout / rows, epochs * counts["with"] / rows, epochs * counts["without"] / rows)


def _sample(policy: Policy, algorithm: Algorithm, config: RunConfig) -> Trajectory:
    """A micro-batch as the learner gets it."""
    noise = Noise(0)
    if algorithm.needs.reward_gradient:
        vars(algorithm)["reward"] = _stand_in_reward
    Learner(policy, algorithm, noise, config.optimizer, config.ema)  # keeps the copies that the losses need
    unit = Unit(0, (0,), (stand_in("a", policy.size),), ROWS * config.rollout.chain_rows)
    needs = algorithm.needs
    sampler = Sampler(policy, noise, algorithm.sample_with, needs.trajectory, shares=True, keep_uncond=needs.uncond)
    trajectory, _ = sampler.sample(unit, policy.settings if policy.settings.source == "data" else None)
    return trajectory.take(torch.arange(trajectory.num_rows))


def _stand_in_reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """[B] with a graph, of no network: what rewards keep is not known here."""
    return images.flatten(1).mean(1)


# --- memory


def model_of(config: RunConfig) -> Model | None:
    """What its folder tells, as far as it is loaded; None where there is none, as for Hub ids that are not here."""
    path = model_path(config.model.path)
    folder = sizes.found(path) if path else None
    left_out = [key for key, value in config.model.model_dump().items() if value is False]
    return sizes.read(folder, left_out) if folder else None


def measure_kept(config: RunConfig, policy: Policy) -> Kept:
    """One micro-batch through the real model."""
    algorithm = make_algorithm(config)
    policy.settings = config.rollout.model_copy(update={"micro_batch": ROWS})
    sample = _sample(policy, algorithm, config)
    weights = {p.untyped_storage().data_ptr() for net in policy.family.nets.values() for p in net.parameters()}
    most = 0
    for bytes_kept in _saved_by_each_loss(policy, algorithm, sample, weights):
        most = max(most, bytes_kept)
    latents = (sample.x, sample.x_next, sample.final)
    embeddings = [*sample.cond.values(), *(sample.uncond or {}).values()]  # here one for each row
    return Kept(*(found // sample.num_rows for found in (most, _num_bytes(latents), _num_bytes(embeddings))))


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


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
