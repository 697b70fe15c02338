"""One prompt of a file or a table: checked, with the place where it stands for messages."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from rlalign.types import Prompt

KEYS = ("text", "negative", "metadata", "image", "video", "weight")


class Row(NamedTuple):
    """A prompt, where it stands, and how often it is drawn in proportion to others."""

    where: str
    prompt: Prompt
    weight: float = 1.0


def row_of(values: Any, where: str, folder: Path) -> Row:
    """Of the values under ``KEYS``, paths counting from the folder. ValueError in words."""
    if not isinstance(values, dict) or not isinstance(values.get("text"), str) or not values["text"].strip():
        raise ValueError(f'{where} needs a "text" that is not empty, as in {{"text": "a red circle"}}')
    strange = values.keys() - {*KEYS}
    if strange:
        raise ValueError(f"{where} has the unknown key {sorted(strange)[0]!r}; known are {', '.join(KEYS)}")
    if not isinstance(values.get("negative"), str | None) or not isinstance(values.get("metadata"), dict | None):
        raise ValueError(f"{where}: negative must be a text and metadata a mapping")
    weight = 1.0 if values.get("weight") is None else values["weight"]
    if not is_number(weight) or weight < 0:
        raise ValueError(f"{where}: weight is {weight!r}, but must be a number that is not negative")
    files = _files(values, where, folder)
    prompt = Prompt(values["text"], values.get("negative"), values.get("metadata") or {}, files=files)
    return Row(where, prompt, float(weight))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parsed(line: str, where: str) -> Any:
    """JSON, ValueError in words."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from None


def of_a_table(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of typed columns: metadata may be JSON text, and what a struct lacks, which is null there, is left out."""
    metadata = values.get("metadata")
    if isinstance(metadata, str):
        metadata = parsed(metadata, f"{where}, metadata")
    return {**values, "metadata": without_nulls(metadata)}


def without_nulls(value: Any) -> Any:
    """All rows of a column have the same keys: {"color": null} is how a table writes that there is no color."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _files(values: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """Absolute paths of the image and of the video's frames, those of the two that the row has."""
    image, video = values.get("image"), values.get("video")
    frames = [] if video is None else video
    if not isinstance(image, str | None) or not isinstance(frames, list) or not all(isinstance(f, str) for f in frames):
        raise ValueError(f"{where}: image must be the path of one file and video a list of those of its frames")
    found: dict[str, Any] = {} if image is None else {"image": str((folder / image).absolute())}
    found |= {"video": [str((folder / frame).absolute()) for frame in frames]} if frames else {}
    for path in (*([found["image"]] if image else []), *found.get("video", [])):
        if not Path(path).is_file():
            raise ValueError(f"{where}: there is no image {path}")
    return found
