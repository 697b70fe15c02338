"""The prompts of a run: which source each part has, and how one source is divided."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rlalign.prompts.config import PromptsConfig, Source
from rlalign.prompts.files import read_file
from rlalign.prompts.hub import read_dataset
from rlalign.prompts.layouts import read_layout
from rlalign.prompts.matching import identity, names, side
from rlalign.prompts.rows import Row
from rlalign.prompts.sets import PromptSet
from rlalign.types import Size

Part = Literal["train", "heldout", "test"]


def read(config: PromptsConfig, part: Part, size: Size | None = None) -> PromptSet:
    """The prompts of one part. ValueError in words."""
    rows, name, folder = _rows_of_part(config, part)
    if part == "train" and config.disjoint:
        shown = {identity(row.prompt) for other in others(config) for row in _rows_of_part(config, other)[0]}
        rows = [row for row in rows if identity(row.prompt) not in shown]
        name = f"{name}, less what is held out,"
    prompts = PromptSet.of(rows, name, folder, size)
    if part == "train":
        prompts = replace(prompts, weights=prompts.weights.tagged(config.weights, prompts.prompts))
    return prompts


def contents(config: PromptsConfig) -> dict[str, Any]:
    """What of the prompts decides a run's numbers, by dotted key: sources by their contents.

    Keys that a run leaves out are not in it, so that keys which came later changed no run's hash.
    """
    part: dict[str, Any] = {"train": _digest(config.train), "heldout": _content(config.heldout)}
    if any(config.shares) or config.disjoint:
        # A test of its own that may overlap with training decides nothing.
        test = config.test if config.disjoint or isinstance(config.test, float) else None
        part |= {"test": _content(test), "split_seed": config.split_seed, "disjoint": config.disjoint}
    if config.weights:
        part["weights"] = json.dumps(config.weights, sort_keys=True)
    return {f"prompts.{key}": value for key, value in part.items()}


def others(config: PromptsConfig) -> tuple[Part, ...]:
    """The parts that nothing is trained on."""
    return ("heldout",) if config.test is None else ("heldout", "test")


def _rows_of_part(config: PromptsConfig, part: Part) -> tuple[list[Row], str, Path]:
    """Rows, a name for messages, and the folder that paths count from."""
    source = {"train": config.train, "heldout": config.heldout, "test": config.test}[part]
    if source is None:
        raise ValueError("the run has no prompts.test; name a file, or a share of prompts.train such as 0.1")
    shared = isinstance(source, float)
    own = config.train if shared else source
    assert not isinstance(own, float)  # of train, so its type says
    rows, name, folder = rows_of(own), _name(own), _folder(own)
    if shared or (part == "train" and any(config.shares)):
        return [row for row in rows if _part_of(row, config) == part], f"{name}, by shares, for {part}", folder
    return rows, name, folder


def _part_of(row: Row, config: PromptsConfig) -> Part:
    """Held-out prompts from below, those for the test from above: a changed share moves none between the two."""
    heldout, test = config.shares
    place = side(identity(row.prompt), config.split_seed)
    if place < heldout:
        return "heldout"
    return "test" if place >= 1 - test else "train"


def rows_of(source: Path | Source) -> list[Row]:
    """All rows of a source, duplicates among them. ValueError in words."""
    if isinstance(source, Path):
        return read_file(source)
    if source.dataset is not None:
        return read_dataset(source)
    assert source.path is not None
    rows = read_file(source.path) if source.layout is None else read_layout(source.layout, source.path, source.split)
    return rows[: source.limit]


def _name(source: Path | Source) -> str:
    if isinstance(source, Path):
        return f"prompts file {source}"
    return f"the dataset {source.dataset}" if source.dataset is not None else f"prompts file {source.path}"


def _folder(source: Path | Source) -> Path:
    if isinstance(source, Source) and source.dataset is not None:
        return Path(source.dataset) if Path(source.dataset).is_dir() else Path()
    path = source if isinstance(source, Path) else source.path
    assert path is not None  # a source that is no dataset is a path
    return path if path.is_dir() else path.parent


def _content(source: Path | Source | float | None) -> str | float | None:
    return _digest(source) if isinstance(source, Path | Source) else source


def _digest(source: Path | Source) -> str:
    """Of a file's bytes, or of what was read from anything else."""
    if isinstance(source, Source):
        rows = [
            [row.prompt.text, row.prompt.negative, row.prompt.metadata, row.weight, names(row.prompt.files)]
            for row in rows_of(source)
        ]
        return f"sha256:{hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()}"
    try:
        return f"sha256:{hashlib.sha256(source.read_bytes()).hexdigest()}"
    except OSError as error:
        raise ValueError(f"cannot read {source}: {error.strerror}") from None
