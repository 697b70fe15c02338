"""What pydantic finds wrong with a run file, as one sentence that says what to change."""

import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlalign.plugins import did_you_mean
from rlalign.runfile import Override, Tree

COMMAND_LINE = "command line"

Place = tuple[str | int, ...]  # ("rewards", 0, "weight")

KINDS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("path_type", "string_type"), "text"),
    **dict.fromkeys(("too_short", "too_long"), "of the right length"),
    "finite_number": "a finite number",
}


class Source:
    """Names where the value at a place of the run file comes from."""

    def __init__(self, name: str, own: Tree, brought: Tree, overrides: Sequence[Override]) -> None:
        self.name, self.own, self.brought = name, own, brought
        self.overridden = [".".join(keys) for keys, _ in overrides]

    def __call__(self, place: Place) -> str:
        key = dotted(place)
        if any(f"{key}.".startswith(f"{one}.") for one in self.overridden):
            return COMMAND_LINE
        return "set by the algorithm" if _holds(self.brought, place) and not _holds(self.own, place) else self.name


def _holds(tree: Any, place: Place) -> bool:
    if not place:
        return True
    inner: Any = dict(enumerate(tree)) if isinstance(tree, list) else tree
    return isinstance(inner, Mapping) and place[0] in inner and _holds(inner[place[0]], place[1:])


def complaint(error: ValidationError, config: type[BaseModel], source: Source) -> str:
    """The first thing that is wrong, unknown keys before all else, since a misspelt key is also a missing one."""
    errors = error.errors()
    strange = [one for one in errors if one["type"] == "extra_forbidden"]
    first = (strange or errors)[0]
    place = _place(config, first["loc"])
    alike = [one for one in errors if _place(config, one["loc"])[: len(place)] == place]  # every member of a union
    meant = next((one for one in alike if _fits(config, one, place, first)), first)
    place = _place(config, meant["loc"])
    alike = [one for one in alike if _place(config, one["loc"])[: len(place)] == place]
    return f"{_sentence(place, config, meant, alike)} ({source(place)})"


def _fits(config: type[BaseModel], error: ErrorDetails, place: Place, first: ErrorDetails) -> bool:
    """Whether the member of a union that this is about has the value's shape, and only something in it is wrong."""
    inner = isinstance(first["input"], Mapping) and len(_place(config, error["loc"])) > len(place)
    return inner or error["type"] == "value_error"


def _sentence(place: Place, config: type[BaseModel], first: ErrorDetails, alike: Sequence[ErrorDetails]) -> str:
    key = dotted(place)
    if first["type"] == "extra_forbidden":
        return f"{key} is not a key{did_you_mean(str(place[-1]), keys_of(block_at(config, place[:-1])))}"
    if first["type"] in ("missing", "too_short", "too_long") and not isinstance(first["input"], Mapping):
        at = place[:-1] if isinstance(place[-1], int) else place
        return f"{dotted(at)} is {_shown(first['input'])}, which has not the right length ({_about(config, at)})"
    if first["type"] == "missing":
        return f"{key} is missing: {_about(config, place)}"
    if first["type"] in ("value_error", "assertion_error"):
        return (f"{key}: " if key else "") + first["msg"].partition(", ")[2]
    wanted = dict.fromkeys(_wanted(one, config, place) for one in alike)
    about = _about(config, place)
    return f"{key} is {_shown(first['input'])}, but must be {' or '.join(wanted)}" + (f" ({about})" if about else "")


def _wanted(error: ErrorDetails, config: type[BaseModel], place: Place) -> str:
    kind, limits = error["type"], error.get("ctx", {})
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"a block of keys: {', '.join(keys_of(block_at(config, place)))}"
    if kind == "literal_error":
        known = [word.strip("'") for word in limits["expected"].replace(" or ", ", ").split(", ")]
        close = did_you_mean(str(error["input"]), known)
        return f"one of {', '.join(known)}" + (close if close.startswith("; did") else "")
    if kind in ("greater_than_equal", "less_than_equal"):
        return f"at {'least' if 'ge' in limits else 'most'} {limits.get('ge', limits.get('le'))}"
    if kind in ("greater_than", "less_than"):
        return f"{'above' if 'gt' in limits else 'below'} {limits.get('gt', limits.get('lt'))}"
    return KINDS.get(kind, error["msg"].removeprefix("Input should be ").removeprefix("Input should "))


def refuse_booleans(given: Any, got: Any, place: Place = ()) -> None:
    """ValueError where `true` was taken for the number 1, as pydantic does when it is not strict."""
    if isinstance(given, bool) and isinstance(got, (int, float)) and not isinstance(got, bool):
        raise ValueError(f"{dotted(place)} is {str(given).lower()}, but must be a number")
    if isinstance(given, Mapping) and isinstance(got, Mapping):
        for key in given.keys() & got.keys():
            refuse_booleans(given[key], got[key], (*place, key))
    elif isinstance(given, (list, tuple)) and isinstance(got, (list, tuple)):
        for index, (one, other) in enumerate(zip(given, got, strict=False)):
            refuse_booleans(one, other, (*place, index))


def dotted(place: Place) -> str:
    return ".".join(map(str, place))


def keys_of(block: type[BaseModel] | None) -> list[str]:
    return list(block.model_fields) if block else []


def block_at(config: type[BaseModel], place: Place) -> type[BaseModel] | None:
    """The settings class that stands at a place of the run file, None where there is no block."""
    found: Any = config
    for part in place:
        if isinstance(part, str):
            block = _block_in(found)
            found = block.model_fields[part].annotation if block and part in block.model_fields else None
        else:
            found = next(iter(typing.get_args(found)), None)
    return _block_in(found)


def _block_in(annotation: Any) -> type[BaseModel] | None:
    """The settings class among the members of `X | None` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    members = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    return next((block for member in members if (block := _block_in(member))), None)


def _place(config: type[BaseModel], location: Sequence[str | int]) -> Place:
    """A pydantic location less the names of union members that it threads in."""
    place: Place = ()
    for number, part in enumerate(location):
        block, last = block_at(config, place), number == len(location) - 1
        if (
            isinstance(part, int)
            or (block and part in block.model_fields)
            or (last and block and not _is_union_member(part, block))
            or (block is None and not _is_union_member(part))
        ):
            place = (*place, part)
    return place


def _is_union_member(part: str, block: type[BaseModel] | None = None) -> bool:
    plain = ("int", "float", "str", "bool", "none", "list", "dict", "constrained-str", "constrained-float")
    return "[" in part or part in plain or (block is not None and part == block.__name__)


def _about(config: type[BaseModel], place: Place) -> str:
    """The sentence under the field."""
    block = block_at(config, place[:-1]) if place and isinstance(place[-1], str) else None
    field = block.model_fields.get(str(place[-1])) if block else None
    return " ".join((field.description or "").split()).rstrip(".") if field else ""


def _shown(value: Any) -> str:
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
