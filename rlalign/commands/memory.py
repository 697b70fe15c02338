"""An account of memory: what each role of a run keeps on its GPU.

Weights are counted from files or configs. Activations are measured where the model was loaded, and otherwise estimated
(rlalign/models/sizes.py). What a GPU's libraries and its allocator take besides, a GiB or two, is not in it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from rlalign import plugins
from rlalign.algorithms.regularise import penalty_of
from rlalign.build import make_algorithm
from rlalign.config import RunConfig
from rlalign.models import sizes
from rlalign.models.base import torch_dtype
from rlalign.models.memory import BEGINNINGS
from rlalign.models.sizes import Model
from rlalign.policy import Policy

DENOISERS = ("transformer", "transformer_2", "unet")  # what diffusers calls the nets that denoise


@dataclass(frozen=True, slots=True)
class Account:
    """Bytes on one GPU by what they are for: what stays there, and what comes and goes, one after the other."""

    stays: Mapping[str, float]
    passes: Mapping[str, float]

    @property
    def total(self) -> float:
        """At the worst moment."""
        return sum(self.stays.values()) + max(self.passes.values())

    @property
    def words(self) -> str:
        worst = max(self.passes, key=lambda name: self.passes[name])
        listed = [*self.stays.items(), (worst, self.passes[worst])]
        return f"about {gib(self.total)}: " + ", ".join(f"{name} {gib(part)}" for name, part in listed if part)

    def beside(self, other: "Account", shared: Collection[str] = ()) -> "Account":
        """Both in one place, at different times; of what is ``shared`` only this one's."""
        more = {name: part for name, part in other.stays.items() if name not in shared}
        stays = {name: self.stays.get(name, 0) + more.get(name, 0) for name in {**self.stays, **more}}
        return Account(stays, {**self.passes, **other.passes})


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that one row keeps for the backward pass of a micro-batch, and one row and one prompt in a step's batch."""

    activations: int
    trajectory: int
    embeddings: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the model of a run."""

    config: RunConfig  # the run's own
    model: Model | None = None  # its folder
    policy: Policy | None = None  # where it was loaded
    kept: Kept | None = None  # as measured with that policy

    @property
    def parts(self) -> Mapping[str, int]:
        """Numbers of each part."""
        if self.model is not None:
            return {part: self.model.numel(part) for part in self.model.parts}
        nets = self.policy.family.nets if self.policy else {}
        return {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}

    def nets(self, config: RunConfig) -> list[str]:
        """Those that train."""
        return config.model.train or next(([name] for name in DENOISERS if name in self.parts), [])

    def trained(self, config: RunConfig) -> int:
        own = self.config.model
        if self.policy is not None and (config.model.lora, config.model.train) == (own.lora, own.train):
            return sum(parameter.numel() for parameter in self.policy.parameters.values())
        if self.model is None:
            return 0
        targets = plugins.load("model", config.model.family).Family.lora_targets
        shapes = {net: self.model.parts[net] for net in self.nets(config) if net in self.model.parts}
        return sum(sizes.trained(shape, net, config.model.lora, targets) for net, shape in shapes.items())

    def activations(self, config: RunConfig) -> float | None:
        """Bytes of a row, measured or estimated."""
        own, now = self._estimated(self.config), self._estimated(config)
        if self.kept is None:
            return now
        return self.kept.activations * (now / own if own and now else 1.0)

    def _estimated(self, config: RunConfig) -> float | None:
        if self.model is None:
            return None
        tokens, size = config.model.model_dump().get("max_sequence_length", 77), config.rollout.size
        checkpointing = config.model.memory.gradient_checkpointing
        nets = [net for net in DENOISERS if net in self.parts]
        rows = [sizes.kept_numbers(self.model, net, size, tokens, checkpointing) for net in nets]
        known = [row for row in rows if row is not None]
        doubled = config.rollout.guidance_scale != 1 and config.rollout.uncond_grad
        return max(known) * itemsize(config) * (2 if doubled else 1) if known else None


# --- what each role keeps


def accounts(config: RunConfig, facts: Facts) -> dict[str, Account]:
    """By role; "" is a process that does everything."""
    learner, sampler, runtime = _of_learner(config, facts), _of_sampler(config, facts), config.runtime
    if runtime.kind == "local":
        alone = runtime.samplers == 1 and not runtime.max_staleness
        return {"": learner.beside(sampler, ("weights", "copies") if alone else ())}
    if runtime.placement != "colocated":
        return {"learner rank": learner, "sampler": sampler}
    if runtime.offload_idle:
        return {"learner rank, in its turn": learner, "sampler, in its turn": sampler}
    return {"learner rank with its sampler": learner.beside(sampler)}


def _of_learner(config: RunConfig, facts: Facts) -> Account:
    rollout, ranks, lora = config.rollout, config.runtime.learners, config.model.lora is not None
    trained, images = facts.trained(config), rollout.prompts_per_step * rollout.samples_per_prompt
    cut = 1 if lora else ranks
    weights = {p: size / (cut if p in facts.nets(config) else 1) for p, size in weights_of(config, facts).items()}
    kept = facts.kept.trajectory * images + facts.kept.embeddings * rollout.prompts_per_step if facts.kept else 0
    stays = {
        "weights": sum(weights.values()),
        "training state": trained * _state_bytes(config) / cut,
        "trajectories of a step": kept / ranks,
    }
    passes = {
        "activations of a micro-batch": (facts.activations(config) or 0) * rollout.micro_batch,
        "gradients in float32": 0 if lora or itemsize(config) != 2 else 2 * trained / cut,  # what masters need beyond
    }
    return Account(stays, passes)


def _state_bytes(config: RunConfig) -> float:
    """Of one trained number, besides the weight itself under full fine-tuning."""
    lora, half = config.model.lora is not None, itemsize(config) == 2
    algorithm = make_algorithm(config)
    copies = len(algorithm.needs.copies) + (config.ema is not None) + penalty_of(algorithm).moves + (not lora)
    each = 4 if lora else itemsize(config)
    master = 4 if half and not lora else 0
    moments = 8 if config.optimizer.kind == "adamw" else 2
    return (each if lora else 0) + each + master + moments + each * copies


def _of_sampler(config: RunConfig, facts: Facts) -> Account:
    rollout, memory, lora = config.rollout, config.model.memory, config.model.lora is not None
    copies = {make_algorithm(config).sample_with, config.evaluation.weights} - {"policy"}
    each = 4 if lora else itemsize(config)
    waiting = weights_of(config, facts, on_cpu=True)
    groups = [sum(w for p, w in waiting.items() if p.startswith(starts)) for starts in BEGINNINGS.values()]
    row = sizes.decoded_numbers(facts.model, rollout.size) if facts.model else None
    stays = {
        "weights": sum(weights_of(config, facts).values()),
        "copies": facts.trained(config) * each * (len(copies) + 1),  # adapters, or the reference
    }
    decoding = (row or 0) * 4 * (1 if memory.vae_slicing else rollout.micro_batch)
    return Account(stays, {"text encoders that are fetched": groups[0], "the VAE at work": groups[1] + decoding})


def weights_of(config: RunConfig, facts: Facts, on_cpu: bool = False) -> dict[str, float]:
    """Bytes of the parts that stay on the GPU, or of those that wait."""
    starts = tuple(start for part in config.model.memory.offload for start in BEGINNINGS[part])
    found = {p: numel * (4 if p == "vae" else itemsize(config)) for p, numel in facts.parts.items()}
    return {part: size for part, size in found.items() if part.startswith(starts or ("\0",)) == on_cpu}


def itemsize(config: RunConfig) -> int:
    return torch_dtype(config.model.dtype).itemsize


def gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"
