"""Readers of public prompt sets as their authors lay them out. The files are the user's own; none is shipped.

    geneval        evaluation_metadata.jsonl, one {"tag", "include", "exclude", "prompt"} a line, as
                   prompts/create_prompts.py of https://github.com/djghosh13/geneval writes it; the metadata files of
                   Flow-GRPO have the same keys
    drawbench      a csv with the columns Prompts and Category: the sheet behind
                   https://github.com/shunk031/huggingface-datasets_DrawBench
    parti          PartiPrompts.tsv, with the columns Prompt, Category, Challenge and Note, without quoting:
                   https://github.com/google-research/parti
    hpdv2          anime.json, concept-art.json ... of the benchmark, each a list of texts, or a folder of them; or
                   train.json and test.json, a list of {"prompt", ...}: https://github.com/tgxs002/HPSv2
    pickapic       a parquet file, or a folder of them called SPLIT-*.parquet, with the column caption:
                   https://huggingface.co/datasets/yuvalkirstain/pickapic_v1
    t2i_compbench  CATEGORY_train.txt and CATEGORY_val.txt, a prompt a line, or the folder with all of them:
                   https://github.com/Karine-Huang/T2I-CompBench, examples/dataset

A set's category becomes metadata["tag"], so that accuracies and weights can be split by it.
"""

import csv
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from rlalign.prompts.config import WITH_SPLITS, Layout
from rlalign.prompts.files import lines_of, table_of, text_of
from rlalign.prompts.rows import Row, parsed
from rlalign.types import Prompt

_OF_SPLIT = re.compile(r"(train|validation|test)(_unique)?-")
_BENCHMARK = ("anime", "concept-art", "paintings", "photo")


def read_layout(layout: Layout, path: Path, split: str | None = None) -> list[Row]:
    """All prompts under the path. ValueError in words."""
    if not path.exists():
        raise ValueError(f"there is no {path}")
    refuse_split(layout, path, split)
    if layout == "t2i_compbench":
        return list(_t2i_compbench(path, split))
    if layout == "pickapic":
        return list(_pickapic(path, split))
    readers = {"geneval": _geneval, "drawbench": _drawbench, "parti": _parti, "hpdv2": _hpdv2}
    return list(readers[layout](path))


def refuse_split(layout: str, path: Path, split: str | None) -> None:
    """ValueError where one is asked for that cannot be told from others."""
    if split is not None and layout not in WITH_SPLITS:
        raise ValueError(f"the layout {layout} has no splits; leave split out, and name the file that you want")
    if split is not None and not path.is_dir():
        raise ValueError(f"{path} is one file; leave split out, which is for a folder")


def _geneval(path: Path) -> Iterator[Row]:
    for where, line in lines_of(_file(path, "evaluation_metadata.jsonl")):
        values = parsed(line, where)
        if not isinstance(values, dict) or not isinstance(values.get("include"), list):
            raise ValueError(f'{where} is not GenEval\'s: it needs "prompt", "tag" and "include"')
        metadata = {key: value for key, value in values.items() if key != "prompt"}
        yield Row(where, Prompt(_text(values, "prompt", where), metadata=metadata))


def _drawbench(path: Path) -> Iterator[Row]:
    for where, values in _cells(path, csv.reader(StringIO(text_of(_file(path))))):
        yield Row(where, Prompt(_text(values, "prompts", where), metadata=_tag(values.get("category"))))


def _parti(path: Path) -> Iterator[Row]:
    lines = csv.reader(StringIO(text_of(_file(path, "PartiPrompts.tsv"))), delimiter="\t", quoting=csv.QUOTE_NONE)
    for where, values in _cells(path, lines):
        more = {key: values[key] for key in ("challenge", "note") if values.get(key)}
        metadata = {**_tag(values.get("category")), **more}
        yield Row(where, Prompt(_text(values, "prompt", where), metadata=metadata))


def _hpdv2(path: Path) -> Iterator[Row]:
    files = [path / f"{style}.json" for style in _BENCHMARK] if path.is_dir() else [path]
    for file in files:
        for where, entry in json_list(_file(file)):
            if isinstance(entry, str):
                yield Row(where, Prompt(entry.strip(), metadata={"tag": file.stem}))
            else:
                yield Row(where, Prompt(_text(entry, "prompt", where)))


def _pickapic(path: Path, split: str | None) -> Iterator[Row]:
    for file in parquet_files(path, split):
        for where, values in table_of(file, ["caption"]):
            yield Row(where, Prompt(_text(values, "caption", where)))


def _t2i_compbench(path: Path, split: str | None) -> Iterator[Row]:
    files = [path]
    if path.is_dir():
        if split not in ("train", "val"):
            raise ValueError(f"{path} holds training and validation prompts; set split to train or val")
        files = sorted(path.glob(f"*_{split}.txt"))  # NAME_val_seen.txt and its like repeat lines of NAME_val.txt
        if not files:
            raise ValueError(f"{path} holds no CATEGORY_{split}.txt as T2I-CompBench has them")
    for file in files:
        tag = re.sub(r"_(train|val)(_.*)?$", "", file.stem)
        for where, line in lines_of(file):
            yield Row(where, Prompt(line.strip(), metadata={"tag": tag}))


def json_list(path: Path) -> list[tuple[str, Any]]:
    """Where it stands and the entry, of a JSON file that holds a list."""
    found = parsed(text_of(path), str(path))
    if not isinstance(found, list):
        raise ValueError(f"{path} holds no JSON list")
    return [(f"{path}, entry {n}", entry) for n, entry in enumerate(found)]


def parquet_files(path: Path, split: str | None) -> list[Path]:
    """The file itself, or those of a folder, which must be of one split."""
    name = "*.parquet" if split is None else f"{split}-*.parquet"
    found = sorted(path.rglob(name)) if path.is_dir() else [path]
    if not found:
        raise ValueError(f"{path} holds no {name} files")
    splits = sorted({file.name.partition("-")[0] for file in found if _OF_SPLIT.match(file.name)})
    if len(splits) > 1:
        raise ValueError(f"{path} holds the splits {', '.join(splits)}; set split to one of them")
    return found


def _file(path: Path, name: str | None = None) -> Path:
    """The file itself, or where a folder is given and the set's file has a name, that one."""
    file = path / name if path.is_dir() and name else path
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    return file


def _cells(path: Path, lines: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows under the header's names in lower case."""
    try:
        header = [name.strip().lower() for name in next(lines, [])]
        for cells in lines:
            if any(cell.strip() for cell in cells):
                row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
                yield f"{path}, line {lines.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}; is a quote left open?") from None


def _text(values: Any, key: str, where: str) -> str:
    text = values.get(key) if isinstance(values, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where} has no text under {key!r}; is that the right layout?")
    return text.strip()


def _tag(category: str | None) -> dict[str, Any]:
    return {"tag": category} if category else {}
