"""Data sets through the library `datasets`, offline, and parquet files by themselves."""

import json
import sys
from pathlib import Path

import datasets
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from rlalign.prompts import PromptSet
from rlalign.prompts.config import Source
from rlalign.prompts.hub import read_dataset
from rlalign.types import Prompt


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits of parquet files, as the Hub lays them out."""
    include = json.dumps([{"class": "kite", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}])
    table = {
        "caption": ["a kite", "a dog", "two dogs"],
        "avoid": ["rain", None, None],
        "category": ["toys", "animals", "animals"],
        "share": [1.0, 2.0, 0.5],
        "info": [{"source": "me", "note": None}, {"source": None, "note": "x"}, {"source": None, "note": None}],
        "asked": [None, json.dumps({"include": json.loads(include)}), None],
    }
    (tmp_path / "set").mkdir()
    parquet.write_table(arrow.table(table), tmp_path / "set" / "train.parquet")
    parquet.write_table(arrow.table({"caption": ["a bird"]}), tmp_path / "set" / "test.parquet")
    return tmp_path / "set"


def prompts_in(source: Source) -> list[Prompt]:
    return [row.prompt for row in read_dataset(source)]


def test_columns_become_prompts(folder: Path) -> None:
    columns = {"text": "caption", "negative": "avoid", "tag": "category", "weight": "share", "metadata": "info"}
    rows = read_dataset(Source(dataset=str(folder), columns=columns))
    assert [row.prompt for row in rows] == [
        Prompt("a kite", "rain", {"source": "me", "tag": "toys"}),
        Prompt("a dog", None, {"note": "x", "tag": "animals"}),
        Prompt("two dogs", None, {"tag": "animals"}),
    ]
    assert [row.weight for row in rows] == [1, 2, 0.5]
    assert rows[1].where == f"{folder}, row 1"


def test_metadata_as_json_text(folder: Path) -> None:
    _, dog, _ = prompts_in(Source(dataset=str(folder), columns={"text": "caption", "metadata": "asked"}))
    assert dog.metadata["include"][1]["position"] == ["above", 0]


def test_splits_and_limits(folder: Path) -> None:
    text = {"text": "caption"}
    assert prompts_in(Source(dataset=str(folder), split="test", columns=text)) == [Prompt("a bird")]
    assert len(prompts_in(Source(dataset=str(folder), columns=text, limit=2))) == 2
    assert len(prompts_in(Source(dataset=str(folder), columns=text, limit=20))) == 3
    assert prompts_in(Source(dataset=str(folder), split="train[1:]", columns=text))[0] == Prompt("a dog")


def test_what_was_saved_to_disk(folder: Path, tmp_path: Path) -> None:
    both = datasets.load_dataset(str(folder), data_files={"train": "train.parquet", "tiny": "train.parquet"})
    both["train"].save_to_disk(str(tmp_path / "one"))
    both.save_to_disk(str(tmp_path / "two"))
    text = {"text": "caption"}
    kites = [Prompt("a kite"), Prompt("a dog"), Prompt("two dogs")]
    assert prompts_in(Source(dataset=str(tmp_path / "one"), columns=text)) == kites
    assert prompts_in(Source(dataset=str(tmp_path / "one"), split="train", columns=text)) == kites
    with pytest.raises(ValueError, match="one is one split, train, not val; leave split out"):
        prompts_in(Source(dataset=str(tmp_path / "one"), split="val", columns=text))
    assert prompts_in(Source(dataset=str(tmp_path / "two"), split="tiny", columns=text)) == kites
    with pytest.raises(ValueError, match="has no split val, but train, tiny"):
        prompts_in(Source(dataset=str(tmp_path / "two"), split="val", columns=text))


def test_what_cannot_be_loaded_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'text' for text; set columns: \{text: NAME\} with one of caption"):
        read_dataset(Source(dataset=str(folder)))
    with pytest.raises(ValueError, match="no column 'colour' for tag"):
        read_dataset(Source(dataset=str(folder), columns={"text": "caption", "tag": "colour"}))
    with pytest.raises(ValueError, match=r"someone/prompts, split train, could not be loaded.* give the folder"):
        read_dataset(Source(dataset="someone/prompts"))
    with pytest.raises(ValueError, match="split val, could not be loaded"):
        read_dataset(Source(dataset=str(folder), split="val", columns={"text": "caption"}))
    with pytest.raises(ValueError, match="row 0, metadata is not JSON"):
        read_dataset(Source(dataset=str(folder), columns={"text": "caption", "metadata": "category"}))


def test_pictures_in_the_table_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "make it blue"}\n')
    with pytest.raises(ValueError, match=r"the column image of .* holds pictures themselves"):
        read_dataset(Source(dataset=str(tmp_path)))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "rlalign\[data\]"'):
        read_dataset(Source(dataset="someone/prompts"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r'needs pyarrow: pip install "rlalign\[data\]"'):
        PromptSet.read(tmp_path / "p.parquet")


def test_parquet_files(tmp_path: Path) -> None:
    """What a struct cannot hold stands as JSON; a key that a row does not have is null in the table."""
    clauses = [{"class": "kite", "count": 1, "color": None}, {"class": "dog", "count": 1, "color": "red"}]
    rows = [{"text": "a kite", "metadata": {"tag": "x", "include": clauses[:1]}, "weight": 3}]
    rows += [{"text": "a red dog", "metadata": {"tag": "y", "include": clauses[1:]}, "weight": 1}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    found = PromptSet.read(tmp_path / "p.parquet")
    assert found.prompts[0].metadata == {"tag": "x", "include": [{"class": "kite", "count": 1}]}
    assert found.prompts[1].metadata["include"][0]["color"] == "red"
    assert found.weights.own == (3.0, 1.0)
    parquet.write_table(arrow.Table.from_pylist([{"text": "a", "metadata": '{"text": "A"}'}]), tmp_path / "p.parquet")
    assert PromptSet.read(tmp_path / "p.parquet").prompts == (Prompt("a", None, {"text": "A"}),)
