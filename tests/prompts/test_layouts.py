"""Public layouts, each on a small file that is laid out as its authors do; the prompts are our own."""

import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from rlalign.prompts import PromptSet
from rlalign.prompts.layouts import read_layout
from rlalign.prompts.pairs import recordings
from rlalign.types import Prompt


def prompts_in(layout: str, path: Path, split: str | None = None) -> list[Prompt]:
    return [row.prompt for row in read_layout(layout, path, split)]


def test_geneval(tmp_path: Path) -> None:
    line = {
        "tag": "counting",
        "include": [{"class": "kite", "count": 3}],
        "exclude": [{"class": "kite", "count": 4}],
        "prompt": "three kites in the sky",
    }
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(json.dumps(line) + "\n")
    metadata = {key: line[key] for key in ("tag", "include", "exclude")}
    assert prompts_in("geneval", path) == prompts_in("geneval", tmp_path) == [Prompt(line["prompt"], None, metadata)]


def test_drawbench(tmp_path: Path) -> None:
    path = tmp_path / "DrawBench.csv"
    path.write_text('Prompts,Category\nA green hat.,Colors\n"One hat, two coats.",Counting\n\nA green hat.,Colors\n')
    assert prompts_in("drawbench", path)[:2] == [
        Prompt("A green hat.", None, {"tag": "Colors"}),
        Prompt("One hat, two coats.", None, {"tag": "Counting"}),
    ]
    assert len(PromptSet.of(read_layout("drawbench", path), "it").prompts) == 2  # a copy repeats every line five times


def test_parti(tmp_path: Path) -> None:
    rows = ['a wall with "Hello on it\tArtifacts\tWriting\tour own words', "a walrus\tAnimals\tBasic\t"]
    (tmp_path / "PartiPrompts.tsv").write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *rows]))
    first = {"tag": "Artifacts", "challenge": "Writing", "note": "our own words"}
    assert prompts_in("parti", tmp_path / "PartiPrompts.tsv") == [
        Prompt('a wall with "Hello on it', None, first),
        Prompt("a walrus", None, {"tag": "Animals", "challenge": "Basic"}),
    ]


def test_hpdv2(tmp_path: Path) -> None:
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"a lamp, {style}", f"a boat, {style}"]))
    found = prompts_in("hpdv2", tmp_path)
    assert len(found) == 8 and found[2] == Prompt("a lamp, concept-art", None, {"tag": "concept-art"})
    assert prompts_in("hpdv2", tmp_path / "photo.json") == found[6:]
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": "a lamp", "image_path": ["0.jpg"], "rank": [1]}]))
    assert prompts_in("hpdv2", tmp_path / "test.json") == [Prompt("a lamp")]


def test_t2i_compbench(tmp_path: Path) -> None:
    files = {"color_train": "a red jar", "color_val": "a blue jar", "color_val_seen": "a blue jar"}
    files |= {"3d_spatial_val": "a jar in front of a mug", "color": "a red jar", "new_objects": "jar - jars"}
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(f"{text}\n")
    assert prompts_in("t2i_compbench", tmp_path, "val") == [
        Prompt("a jar in front of a mug", None, {"tag": "3d_spatial"}),
        Prompt("a blue jar", None, {"tag": "color"}),
    ]
    assert prompts_in("t2i_compbench", tmp_path / "color_val_seen.txt")[0].metadata == {"tag": "color"}
    with pytest.raises(ValueError, match="set split to train or val"):
        prompts_in("t2i_compbench", tmp_path)


def pickapic(folder: Path) -> Path:
    rows = [("a fox", 1.0, 0.0, True), ("a fox", 0.5, 0.5, True), ("a crow", 0.0, 1.0, False)]
    captions, first, second, labelled = zip(*rows, strict=True)
    table = {"caption": captions, "label_0": first, "label_1": second, "has_label": labelled}
    table |= {"jpg_0": [b"zero"] * 3, "jpg_1": [b"one"] * 3, "image_0_uid": ["u"] * 3}
    (folder / "data").mkdir()
    parquet.write_table(arrow.table(table), folder / "data" / "train-00000.parquet")
    return folder


def test_pickapic(tmp_path: Path) -> None:
    assert prompts_in("pickapic", pickapic(tmp_path)) == [Prompt("a fox"), Prompt("a fox"), Prompt("a crow")]


def test_pairs_of_pickapic(tmp_path: Path) -> None:
    found = list(recordings("pickapic", pickapic(tmp_path), tmp_path / "own.jsonl"))
    names = [[f"images/own/000000{row}_{which}.jpg" for which in (0, 1)] for row in (0, 1)]
    assert found == [
        {"text": "a fox", "metadata": {"images": names[0], "scores": [1.0, 0.0]}},
        {"text": "a fox", "metadata": {"images": names[1], "scores": [0.5, 0.5]}},
    ]
    assert [(tmp_path / name).read_bytes() for name in names[1]] == [b"zero", b"one"]
    (other, _) = recordings("pickapic", tmp_path, tmp_path / "other.jsonl")
    assert other["metadata"]["images"] == ["images/other/0000000_0.jpg", "images/other/0000000_1.jpg"]


@pytest.mark.parametrize("split", ["validation", "test_unique"])
def test_a_split_of_pickapic(tmp_path: Path, split: str) -> None:
    table = arrow.table({"caption": ["an owl"], "jpg_0": [b""], "jpg_1": [b""], "label_0": [1.0], "label_1": [0.0]})
    table = table.append_column("has_label", arrow.array([True]))
    parquet.write_table(table, pickapic(tmp_path) / "data" / f"{split}-00000.parquet")
    parquet.write_table(table, tmp_path / "data" / f"{split}_more-00000.parquet")
    assert prompts_in("pickapic", tmp_path, split) == [Prompt("an owl")]
    assert len(prompts_in("pickapic", tmp_path, "train")) == 3
    assert [line["text"] for line in recordings("pickapic", tmp_path, tmp_path / "a.jsonl", split)] == ["an owl"]
    with pytest.raises(ValueError, match="set split to one of them"):
        prompts_in("pickapic", tmp_path)
    with pytest.raises(ValueError, match=r"holds no val-\*\.parquet files"):
        prompts_in("pickapic", tmp_path, "val")


def test_a_split_where_there_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a jar")
    with pytest.raises(ValueError, match="the layout parti has no splits; leave split out"):
        prompts_in("parti", tmp_path, "val")
    with pytest.raises(ValueError, match=r"p\.txt is one file; leave split out"):
        prompts_in("t2i_compbench", tmp_path / "p.txt", "val")
    with pytest.raises(ValueError, match="the layout hpdv2 has no splits"):
        list(recordings("hpdv2", tmp_path, tmp_path / "a.jsonl", "val"))


@pytest.mark.parametrize("row", [{"caption": None}, {"label_1": None}])
def test_pairs_of_pickapic_without_caption_or_label_are_named(tmp_path: Path, row: dict[str, None]) -> None:
    whole = {"caption": "a fox", "jpg_0": b"", "jpg_1": b"", "label_0": 1.0, "label_1": 0.0, "has_label": True}
    parquet.write_table(arrow.Table.from_pylist([whole, whole | row]), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="row 1 needs a caption, and numbers as label_0 and label_1"):
        list(recordings("pickapic", tmp_path, tmp_path / "a.jsonl"))


def test_pairs_of_hpdv2(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("train/a.jpg", "train/b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(b"")
    entry = {"prompt": "a fox", "file_path": ["a.jpg", "b.jpg"], "human_preference": [0, 1], "user_hash": "x"}
    (tmp_path / "train.json").write_text(json.dumps([entry]))
    (found,) = recordings("hpdv2", tmp_path / "train.json", tmp_path / "a.jsonl")
    images = [str(tmp_path / "train" / name) for name in ("a.jpg", "b.jpg")]
    assert found == {"text": "a fox", "metadata": {"images": images, "scores": [0, 1]}}
    (tmp_path / "test.json").write_text(json.dumps([{"prompt": "a fox", "image_path": ["c.jpg"], "rank": [3]}]))
    (ranked,) = recordings("hpdv2", tmp_path / "test.json", tmp_path / "a.jsonl")
    assert ranked["metadata"] == {"images": [str(tmp_path / "c.jpg")], "scores": [-3]}
    (tmp_path / "c.jpg").unlink()
    with pytest.raises(ValueError, match="there is no image"):
        list(recordings("hpdv2", tmp_path / "test.json", tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("layout", "content", "words"),
    [
        ("geneval", '{"tag": "colors", "prompt": "a"}', "line 1 is not GenEval's"),
        ("geneval", '{"include": [], "prompt": ""}', "line 1 has no text under 'prompt'"),
        ("geneval", "{", "line 1 is not JSON"),
        ("drawbench", "a,b\n1,2\n", "no text under 'prompts'; is that the right layout"),
        ("drawbench", f'Prompts\na "{"x" * 99}\n"b{"x" * 2**17}', "line 3: field larger .*; is a quote left open"),
        ("parti", "Category\nx\n", "no text under 'prompt'"),
        ("hpdv2", '{"a": 1}', "holds no JSON list"),
        ("hpdv2", "[3]", "entry 0 has no text under 'prompt'"),
        ("pickapic", "nonsense", "cannot be read as parquet"),
    ],
)
def test_what_is_laid_out_otherwise_is_named(tmp_path: Path, layout: str, content: str, words: str) -> None:
    path = tmp_path / "set"
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        prompts_in(layout, path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no"):
        prompts_in("geneval", tmp_path / "nowhere")
    for layout, words in (("geneval", "no file"), ("hpdv2", "no file"), ("pickapic", r"no \*\.parquet")):
        with pytest.raises(ValueError, match=words):
            prompts_in(layout, tmp_path)
    with pytest.raises(ValueError, match=r"no CATEGORY_val\.txt"):
        prompts_in("t2i_compbench", tmp_path, "val")
    with pytest.raises(ValueError, match="has no judged images"):
        list(recordings("parti", tmp_path, tmp_path / "a.jsonl"))
