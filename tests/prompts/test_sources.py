"""The parts of a run's prompts: shares of one source, parts that do not overlap, and what of it is hashed."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlalign.config import RunConfig, load
from rlalign.prompts import PromptsConfig, read
from rlalign.prompts.matching import identity
from rlalign.prompts.sources import Part, contents
from tests.runs import run_file

PARTS: tuple[Part, ...] = ("train", "heldout", "test")


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def wordings(number: int) -> list[dict[str, Any]]:
    """Of one composition, in two orders."""
    include = [{"class": "dog", "count": number}, {"class": "kite", "count": 1}]
    texts = (f"{number} dogs and a kite", f"a kite beside {number} dogs")
    return [
        {"text": text, "metadata": {"include": include[::order]}} for text, order in zip(texts, (1, -1), strict=True)
    ]


def split(path: Path, **settings: Any) -> dict[Part, set[str]]:
    config = PromptsConfig(train=path, **settings)
    parts = PARTS if config.test is not None else PARTS[:2]
    return {part: {prompt.text for prompt in read(config, part).prompts} for part in parts}


def test_shares_divide_one_source_by_content(tmp_path: Path) -> None:
    rows = [row for number in range(1, 201) for row in wordings(number)]
    parts = split(written(tmp_path / "p.jsonl", *rows), heldout=0.2, test=0.1)
    assert sum(map(len, parts.values())) == 400 and not parts["train"] & parts["heldout"]
    assert 40 < len(parts["heldout"]) < 120 and 16 < len(parts["test"]) < 70
    for texts in parts.values():  # both wordings of a composition stand together
        assert {f"a kite beside {text.split()[0]} dogs" for text in texts if text.endswith("kite")} == {
            text for text in texts if text.startswith("a kite")
        }


def test_other_prompts_move_nothing_across(tmp_path: Path) -> None:
    few = written(tmp_path / "few.jsonl", *(row for number in range(1, 101) for row in wordings(number)))
    before = split(few, heldout=0.2, test=0.1)
    more = [row for number in range(300, 0, -1) for row in wordings(number)]
    after = split(written(tmp_path / "more.jsonl", *more), heldout=0.2, test=0.1)
    assert all(before[part] <= after[part] for part in PARTS)
    larger = split(few, heldout=0.4, test=0.1)  # a larger share takes from training alone
    assert larger["test"] == before["test"] and before["heldout"] < larger["heldout"]
    assert split(few, heldout=0.2, test=0.1, split_seed=1)["heldout"] != before["heldout"]


def test_parts_of_their_own_can_be_kept_out_of_training(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", *wordings(1), *wordings(2), *wordings(3), {"text": "a lamp"})
    heldout, test = written(tmp_path / "h.jsonl", wordings(2)[1]), written(tmp_path / "t.jsonl", {"text": "A Lamp!"})
    assert len(split(train, heldout=heldout, test=test)["train"]) == 7
    alone = split(train, heldout=heldout, test=test, disjoint=True)["train"]
    assert alone == {row["text"] for number in (1, 3) for row in wordings(number)}
    with pytest.raises(ValueError, match="less what is held out, holds no prompts"):
        split(heldout, heldout=train, disjoint=True)


def test_a_share_of_nothing_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"text": "a lamp"})
    with pytest.raises(ValueError, match="by shares, for heldout holds no prompts"):
        split(path, heldout=0.01)
    with pytest.raises(ValueError, match=r"no prompts\.test"):
        read(PromptsConfig(train=path, heldout=path), "test")


def test_layouts_and_limits(tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("Prompts,Category\na,x\nb,y\nc,y\n")
    source = {"path": tmp_path / "set.csv", "layout": "drawbench", "limit": 2}
    config = PromptsConfig(train=source, heldout=written(tmp_path / "h.jsonl", {"text": "d"}), weights={"y": 2})
    assert [prompt.metadata["tag"] for prompt in read(config, "train").prompts] == ["x", "y"]
    assert read(config, "train").weights.at(0, read(config, "train").prompts).tolist() == [1, 2]


# --- in the run file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_file(tmp_path)


def hashes(run: Path, *overrides: str) -> str:
    return load(run, overrides).config_hash


def test_keys_that_are_left_out_are_not_hashed(run: Path) -> None:
    """The hash of a plain run is over the two files' bytes and nothing that was added since."""
    assert set(contents(load(run).prompts)) == {"prompts.train", "prompts.heldout"}
    plain = hashes(run)
    assert hashes(run, f"prompts.test={run.parent}/heldout.txt") == plain  # nothing of training depends on it
    (run.parent / "test.txt").write_text("one")
    told, disjoint = ["prompts.heldout=0.5", f"prompts.test={run.parent}/test.txt"], "prompts.disjoint=true"
    before = hashes(run, *told), hashes(run, *told, disjoint)
    (run.parent / "test.txt").write_text("two")
    assert hashes(run, *told) == before[0] and hashes(run, *told, disjoint) != before[1]
    changed = {
        hashes(run, "prompts.heldout=0.5"),
        hashes(run, "prompts.heldout=0.5", "prompts.split_seed=1"),
        hashes(run, "prompts.test=0.25"),
        hashes(run, "prompts.disjoint=true"),
        hashes(run, f"prompts.train={{path: {run.parent}/train.txt, limit: 2}}"),
    }
    assert len(changed | {plain}) == 6


def test_a_source_is_hashed_by_what_it_holds(run: Path, tmp_path: Path) -> None:
    (tmp_path / "set.csv").write_text("Prompts,Category\na,x\nb,y\n")
    source = f"prompts.train={{path: {tmp_path}/set.csv, layout: drawbench}}"
    before = hashes(run, source)
    assert hashes(run, source, "prompts.weights={y: 2}") != before
    (tmp_path / "set.csv").rename(tmp_path / "moved.csv")
    assert hashes(run, source.replace("set.csv", "moved.csv")) == before
    (tmp_path / "moved.csv").write_text("Prompts,Category\na,x\nc,y\n")
    assert hashes(run, source.replace("set.csv", "moved.csv")) != before


def test_a_config_reads_back(run: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    text = run.read_text().replace("train: train.txt", "train: {path: train.txt, limit: 3}")
    text = text.replace("heldout: heldout.txt", "heldout: 0.5, test: {dataset: set, columns: {text: t}}, weights: {}")
    run.write_text(text)
    config = load(run)
    assert config.prompts.train.path == tmp_path / "train.txt"
    assert config.prompts.test.dataset == str(tmp_path / "set")
    assert type(config).model_validate(config.tree()) == config
    assert load(run, ["prompts.test={dataset: someone/prompts}"]).prompts.test.dataset == "someone/prompts"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prompts.train=3", "prompts.train is 3, but must be text or a block of keys: path"),
        ("prompts.heldout=1.5", "prompts.heldout is 1.5, but must be text or a block.* or below 1"),
        ("prompts.train={pth: a}", "prompts.train.pth is not a key; did you mean 'path'"),
        ("prompts.train={limit: 0, path: a}", "prompts.train.limit is 0, but must be at least 1"),
        ("prompts.train={path: a, dataset: b}", "prompts.train: name either path or dataset"),
        ("prompts.train={path: a, columns: {text: b}}", "prompts.train: columns belongs to a dataset"),
        ("prompts.train={path: a, layout: part}", "did you mean 'parti'"),
        ("prompts.train={path: a, split: val}", "prompts.train: split belongs to a dataset"),
        ("prompts.train={dataset: a, layout: parti}", "layout is for files"),
        ("prompts={train: a, heldout: 0.5, test: 0.5}", "prompts: the shares heldout and test leave nothing"),
        ("prompts.weights={x: -1}", "prompts.weights.x is -1, but must be at least 0"),
        ("prompts.weights={x: [[0, 1, 2]]}", "prompts.weights.x is .* a number or of the right length"),
        ("prompts.weights={x: [[5, 1], [5, 2]]}", "prompts.weights: the steps of x must rise"),
    ],
)
def test_what_cannot_be_meant_is_refused(run: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(run, [override])


def test_no_part_repeats_a_wish_of_another(run: Path, tmp_path: Path) -> None:
    rows = [row for number in range(1, 60) for row in wordings(number)]
    written(tmp_path / "train.jsonl", *rows)
    config: RunConfig = load(run, [f"prompts.train={tmp_path}/train.jsonl", "prompts.heldout=0.3"])
    train, heldout = (read(config.prompts, part).prompts for part in ("train", "heldout"))
    assert not {identity(prompt) for prompt in train} & {identity(prompt) for prompt in heldout}
