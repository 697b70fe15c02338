"""When two configs mean the same run: the part that decides the numbers, its hash, and what differs."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

OPERATIONAL = (
    *("steps", "checkpoint", "reporting", "runtime"),
    *("model.memory.gradient_checkpointing", "model.memory.offload", "model.memory.embeddings"),
)
"""Blocks and keys that do not decide the numbers ..."""
NUMERIC = ("runtime.threads_per_worker", "runtime.max_staleness", "runtime.learners")
"""... but for these: they change the last bits, the weights that sample, or the order of a sum."""
RESHAPES = ("runtime.learners",)
"""Of those, what a run may change on its way: checkpoints fit any number of ranks, only the last bits differ."""
ENVIRONMENT = re.compile(r"rewards\.\d+\.(venv|pip)(\.|$)")
"""Where a reward finds its packages, which may be mended like its code, and lies elsewhere on another machine."""


def hashed_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the numbers, as flat dotted keys: everything but ``OPERATIONAL`` and ``ENVIRONMENT``, plus
    ``NUMERIC``."""
    return {key: value for key, value in flat(config) if key in NUMERIC or not _operational(key)}


def _operational(key: str) -> bool:
    return any(f"{key}.".startswith(f"{one}.") for one in OPERATIONAL) or ENVIRONMENT.match(key) is not None


def hash_of(hashed: Mapping[str, Any]) -> str:
    """SHA-256, the same on every machine."""
    return hashlib.sha256(json.dumps(hashed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def checkpoint_hash(hashed: Mapping[str, Any]) -> str:
    """Of what a checkpoint depends on."""
    return hash_of({key: value for key, value in hashed.items() if key not in RESHAPES})


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One phrase for each dotted key that differs, in the order of the new config."""
    before, after = dict(flat(old)), dict(flat(new))
    keys = dict.fromkeys([*after, *before])
    return [_change(key, before, after) for key in keys if before.get(key, keys) != after.get(key, keys)]


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key: {"a": [{"b": 1}]} -> ("a.0.b", 1)."""
    items = dict(enumerate(value)) if isinstance(value, (list, tuple)) else value
    if not isinstance(items, Mapping) or not items:
        yield prefix, value
        return
    for key, inner in items.items():  # pyright: ignore[reportUnknownVariableType]
        yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))  # pyright: ignore[reportUnknownArgumentType]


def _change(key: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    if key not in before:
        return f"{key} is new"
    if key not in after:
        return f"{key} is gone"
    return f"{key} was {before[key]!r} and is {after[key]!r}"
