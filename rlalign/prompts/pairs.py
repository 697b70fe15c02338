"""Public sets of judged images as recordings that ``rollout.source: data`` learns from (docs/preferences.md).

hpdv2     train.json, {"prompt", "file_path": [...], "human_preference": [1, 0]}, and test.json, {"prompt",
          "image_path": [...], "rank": [...]} with the best first at rank 0 or 1; images in the folders train/ and
          test/ beside the file: https://github.com/tgxs002/HPSv2
pickapic  rows with caption, the bytes jpg_0 and jpg_1, label_0 and label_1 (1 and 0, or 0.5 twice for a tie) and
          has_label: https://huggingface.co/datasets/yuvalkirstain/pickapic_v1
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlalign.prompts.files import table_of
from rlalign.prompts.layouts import json_list, parquet_files, refuse_split
from rlalign.prompts.rows import is_number

Recording = dict[str, Any]  # a line of the .jsonl

_COLUMNS = ["caption", "jpg_0", "jpg_1", "label_0", "label_1", "has_label"]


def recordings(layout: str, path: Path, to: Path, split: str | None = None) -> Iterator[Recording]:
    """Lines for the file ``to``; pictures that stand in tables are written beside it, into images/NAME of the file."""
    if not path.exists():
        raise ValueError(f"there is no {path}")
    if layout not in ("hpdv2", "pickapic"):
        raise ValueError(f"the layout {layout} has no judged images; those of hpdv2 and pickapic have")
    refuse_split(layout, path, split)
    if layout == "hpdv2":
        yield from _hpdv2(path)
    else:
        yield from _pickapic(path, split, to.parent / "images" / to.stem)


def _hpdv2(path: Path) -> Iterator[Recording]:
    for where, entry in json_list(path):
        names = entry.get("file_path", entry.get("image_path")) if isinstance(entry, dict) else None
        scores = entry.get("human_preference", entry.get("rank")) if isinstance(entry, dict) else None
        if not isinstance(names, list) or not isinstance(scores, list) or len(names) != len(scores):
            raise ValueError(f"{where} has no images with as many preferences or ranks; is that the right file?")
        if not all(is_number(score) for score in scores) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f"{where} needs a prompt, and numbers as preferences or ranks")
        judged = scores if "human_preference" in entry else [-rank for rank in scores]
        images = [str(_found(path, name, where)) for name in names]
        yield {"text": entry["prompt"].strip(), "metadata": {"images": images, "scores": judged}}


def _found(path: Path, name: str, where: str) -> Path:
    """The file beside the annotations, or in the folder that is called as they are: train.json, train/."""
    places = [path.parent / path.stem / name, path.parent / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"{where}: there is no image {places[0]}")
    return found.absolute()


def _pickapic(path: Path, split: str | None, images: Path) -> Iterator[Recording]:
    images.mkdir(parents=True, exist_ok=True)
    number = 0
    for file in parquet_files(path, split):
        for where, row in table_of(file, _COLUMNS):
            if not row["has_label"]:
                continue
            if not all(isinstance(row[key], bytes) for key in ("jpg_0", "jpg_1")):
                raise ValueError(f"{where} has no pictures; take the set with images")
            scores = [row["label_0"], row["label_1"]]
            if not isinstance(row["caption"], str) or not all(is_number(score) for score in scores):
                raise ValueError(f"{where} needs a caption, and numbers as label_0 and label_1")
            names = [f"{number:07d}_{which}.jpg" for which in (0, 1)]
            for which, name in enumerate(names):
                (images / name).write_bytes(row[f"jpg_{which}"])
            places = [f"{images.parent.name}/{images.name}/{name}" for name in names]
            metadata = {"images": places, "scores": scores}
            yield {"text": row["caption"].strip(), "metadata": metadata}
            number += 1
