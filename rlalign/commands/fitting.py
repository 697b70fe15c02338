"""What plan says of memory: the account of each role, and the settings that would make it fit, cheapest first."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlalign import machine
from rlalign.commands.memory import Facts, accounts, gib, weights_of
from rlalign.config import RunConfig, resolve
from rlalign.models.lora import LoraConfig


def lines(facts: Facts, gpu_memory: float | None) -> Iterator[tuple[str, str]]:
    """What plan prints; ``gpu_memory`` in bytes, None for what there is here."""
    config = facts.config
    how = f"LoRA of rank {config.model.lora.rank}" if config.model.lora else "full fine-tuning"
    if not facts.parts:
        yield "weights", f"unknown: {config.model.path} is not here; a folder with its config.json files is enough"
        return
    parts = ", ".join(f"{part} {numel:,}" for part, numel in facts.parts.items())
    yield "weights", f"{sum(facts.parts.values()):,} parameters ({parts}), {facts.trained(config):,} trained ({how})"
    if facts.model is not None and facts.model.unknown:
        yield "", f"and what {', '.join(facts.model.unknown)} have, which is unknown"
    for role, account in accounts(config, facts).items():
        yield "memory", f"{role}: {account.words}" if role else account.words
    yield from _notes(config, facts)
    available, where = (gpu_memory, "of a GPU") if gpu_memory is not None else _available()
    for role, account in accounts(config, facts).items():
        if account.total > available:
            whose = role or "that"
            yield "warning", f"{whose} is more than the {gib(available)} {where}; {advice(facts, role, available)}"


def _notes(config: RunConfig, facts: Facts) -> Iterator[tuple[str, str]]:
    if facts.kept is not None:
        yield "", "activations and trajectories are measured on the model"
    elif facts.activations(config) is not None:
        yield "", "activations are estimated, within about a third; --measure loads the model to measure them"
    else:
        yield "", "without activations and trajectories, which --measure finds by loading the model"
    if waiting := sum(weights_of(config, facts, on_cpu=True).values()):
        yield "", f"{gib(waiting)} of weights wait in CPU memory"
    if any(reward.role != "monitor" for reward in config.rewards) and config.runtime.gpus_per_scorer:
        yield "", "scorers: what their rewards load, which is unknown here"


def advice(facts: Facts, role: str, available: float) -> str:
    """Settings to try, one after the other, until it fits; with what each leads to."""
    config, said = facts.config, list[str]()
    for key, value in _remedies(facts):
        total = _total(config, facts, role)
        if total <= available:
            break
        if key == "rollout.micro_batch":
            value = _rows_that_fit(config, facts, role, available)
        changed = with_key(config, key, value)
        if _total(changed, facts, role) < 0.99 * total and _is_allowed(changed):
            config = changed
            said.append(f"{key}={_spelled(value)} (about {gib(_total(config, facts, role))})")
    fits = _total(config, facts, role) <= available
    if not said:
        return "a larger GPU, a smaller model or a smaller rollout.size is needed"
    return f"set {', then '.join(said)}" + ("" if fits else ", which is still too much: a larger GPU is needed")


def _remedies(facts: Facts) -> Iterator[tuple[str, Any]]:
    """What costs least first, whether the run's other settings allow it or not."""
    config = facts.config
    yield "model.memory.gradient_checkpointing", True
    yield "model.memory.vae_slicing", True
    if config.model.dtype in ("float32", "float64"):
        yield "model.dtype", "bfloat16"
    if facts.model is not None:
        yield "model.memory.offload", ["text_encoders"]
        yield "model.memory.offload", ["text_encoders", "vae"]
    if config.runtime.placement == "colocated":
        yield "runtime.offload_idle", True
    yield "rollout.micro_batch", None
    yield "optimizer.kind", "adamw8bit"
    if config.model.lora is None:
        yield "model.lora", LoraConfig()


def _is_allowed(config: RunConfig) -> bool:
    """Whether a run file may say so."""
    try:
        resolve(config.tree(), Path(), "plan")
    except ValueError:
        return False
    return True


def _rows_that_fit(config: RunConfig, facts: Facts, role: str, available: float) -> int:
    for rows in range(config.rollout.micro_batch - 1, 1, -1):
        if _total(with_key(config, "rollout.micro_batch", rows), facts, role) <= available:
            return rows
    return 1


def _total(config: RunConfig, facts: Facts, role: str) -> float:
    """Of the role, or where a setting splits it, of the largest that it is split into."""
    found = accounts(config, facts)
    return found[role].total if role in found else max(account.total for account in found.values())


def with_key(config: Any, key: str, value: Any) -> Any:
    """The config with another value under a dotted key."""
    first, _, rest = key.partition(".")
    return config.model_copy(update={first: with_key(getattr(config, first), rest, value) if rest else value})


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return str(value) if isinstance(value, str | int) else "{}"


def _available() -> tuple[float, str]:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], "of the GPU here"
    return machine.hardware()["memory_gib"] * 2**30, "here"
