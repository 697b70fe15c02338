"""Run files and overrides as plain trees of values, before anyone asks what the keys mean."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]
Override = tuple[tuple[str, ...], Any]  # the parts of a dotted key, and the value

KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class Loader(yaml.SafeLoader):
    """YAML that reads 1e-4 as a number, as everyone means it, and refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value  # of a mapping's key that is no text: a list of nodes, refused below
            if isinstance(key, str) and key in seen and key != "<<":
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, in which a number with an exponent needs a dot and a sign: 1.0e-4.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read(path: Path) -> Tree:
    """The run file's blocks; ValueError in one sentence."""
    try:
        tree = yaml.load(path.read_bytes(), Loader)
    except OSError as error:
        raise ValueError(f"cannot read the run file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a run file: it is not text") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not a run file: {_in_words(error)}") from None
    if tree is None:
        raise ValueError(f"{path.name} is empty; it needs at least the blocks model, prompts and rewards")
    if not isinstance(tree, dict):
        raise ValueError(f"{path.name} holds a {type(tree).__name__} and not blocks such as `model:` and `rewards:`")
    return {str(key): value for key, value in tree.items()}


def parse(overrides: Sequence[str]) -> list[Override]:
    """``optimizer.lr=1e-4`` -> (("optimizer", "lr"), 0.0001); values are written as in a run file."""
    return [_parsed(word) for word in overrides]


def _parsed(word: str) -> Override:
    key, equals, text = word.partition("=")
    if not equals or not KEY.fullmatch(key):
        raise ValueError(f"{word!r} is not an override; write key=value, as in optimizer.lr=1e-4")
    try:
        return tuple(key.split(".")), yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"the value of the override {word!r} cannot be read: {_in_words(error)}") from None


def put(tree: Tree, override: Override) -> None:
    """Sets one value in the tree; a number in the key is a place in a list, one past its end appends."""
    keys, value = override
    holder: Any = tree
    for depth, key in enumerate(keys[:-1], start=1):
        at, place = ".".join(keys[:depth]), _place(holder, key, ".".join(keys[: depth - 1]))
        if isinstance(holder, list) and place == len(holder):
            holder.append({})
        if isinstance(holder, dict) and holder.get(place) is None:
            holder[place] = {}
        holder = holder[place]
        if not isinstance(holder, (dict, list)):
            raise ValueError(f"{'.'.join(keys)} is not a key: {at} is the single value {holder!r} (command line)")
    place = _place(holder, keys[-1], ".".join(keys[:-1]))
    if isinstance(holder, list) and place == len(holder):
        holder.append(value)
    else:
        holder[place] = value


def _place(holder: Any, key: str, at: str) -> Any:
    if isinstance(holder, dict):
        return key
    if not key.isdecimal() or int(key) > len(holder):
        raise ValueError(
            f"{at}.{key} is not a key: {at} is a list, so write {at}.0 to {at}.{len(holder)} (command line)"
        )
    return int(key)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> Tree:
    """A new tree: ``over`` wins, blocks are merged key by key, lists are replaced whole."""
    result = {key: _copied(value) for key, value in under.items()}
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else _copied(value)
    return result


def without(tree: Mapping[str, Any], covered: Mapping[str, Any]) -> Tree:
    """The tree less those keys that ``covered`` has a value for."""
    result: Tree = {}
    for key, value in tree.items():
        if key not in covered:
            result[key] = value
        elif isinstance(value, Mapping) and isinstance(covered[key], Mapping):
            result[key] = without(value, covered[key])
    return result


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _in_words(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
    return f"{line}{error.problem}"
