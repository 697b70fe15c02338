"""What choosing an algorithm, or a paper's preset, brings along for the other blocks of a run file."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from rlalign import plugins
from rlalign.runfile import Override, Tree, merged, without

ALGORITHM_NAME = ("algorithm", "name")
DEFAULT_ALGORITHM = "grpo"


def choose(own: Tree, overrides: Sequence[Override]) -> tuple[Tree, Tree, ModuleType]:
    """What of the run file's tree holds, what the chosen algorithm brings along, and its module.

    Another algorithm than the file's brings its own settings: what the file says for its own algorithm is dropped. But
    the size of samples is the file's to say, even where the preset that it names has one.
    """
    block = own.get("algorithm", {})
    if not isinstance(block, dict):
        raise ValueError(f"algorithm is {block!r}, but must be a name or a block of keys, one of them `name`")
    in_file = block.get("name", DEFAULT_ALGORITHM)
    chosen = next((value for keys, value in reversed(overrides) if keys == ALGORITHM_NAME), in_file)
    if chosen != in_file:
        left = without(overlay(in_file)[0], {"rollout": {"size": None}})
        own, block = without(own, {**left, "algorithm": None}), {}
    brought, module = overlay(chosen)
    return {**own, "algorithm": {**block, "name": _short_name(chosen)}}, brought, module


def _short_name(chosen: str) -> str:
    """A preset's algorithm, or the name as it was given."""
    return presets()[chosen][0].__name__.rpartition(".")[2] if chosen in presets() else chosen


def overlay(name: Any) -> tuple[Tree, ModuleType]:
    """What choosing an algorithm or a paper's preset means for the other blocks, and the algorithm's module."""
    if not isinstance(name, str):
        raise ValueError(f"algorithm.name is {name!r}, but must be one of {', '.join(algorithm_names())}")
    module, preset = presets().get(name, (None, {}))
    if module is None:
        known = algorithm_names()
        if name not in known and not name.endswith(".py") and "." not in name:
            raise ValueError(f"no algorithm or preset called {name!r}{plugins.did_you_mean(name, known)}")
        module = plugin("algorithm", name, ("Config", "Algorithm", "OVERLAY"), "algorithm.name")
    return merged(module.OVERLAY, preset), module


def presets() -> dict[str, tuple[ModuleType, Tree]]:
    """The papers' presets: each with the algorithm that it sets."""
    modules = [plugins.load("algorithm", name) for name in plugins.names("algorithm")]
    return {name: (module, preset) for module in modules for name, preset in getattr(module, "PRESETS", {}).items()}


def algorithm_names() -> list[str]:
    return [*plugins.names("algorithm"), *presets()]


def plugin(kind: plugins.Kind, name: str, needed: Sequence[str], source: str) -> ModuleType:
    """The module of a part, which must define what is ``needed``; ``source`` says who names it."""
    try:
        module = plugins.load(kind, name)
    except ValueError as error:
        raise ValueError(f"{error} ({source})") from None
    if missing := [part for part in needed if part not in vars(module)]:
        raise ValueError(f"{name} is no {kind}: it defines no {missing[0]} ({source})")
    return module
