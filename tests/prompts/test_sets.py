import json
from pathlib import Path

import pytest

from rlalign.prompts import PromptSet
from rlalign.types import Prompt


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_text_and_jsonl_are_read_in_order_and_once(tmp_path: Path) -> None:
    plain = PromptSet.read(written(tmp_path / "p.txt", "a cat\n\na dog\na cat\n"))
    assert [prompt.text for prompt in plain.prompts] == ["a cat", "a dog"]
    row = {"text": "two cats", "negative": "dogs", "metadata": {"tag": "counting"}}
    rich = PromptSet.read(written(tmp_path / "p.jsonl", json.dumps(row) + "\n" + json.dumps({"text": "two cats"})))
    assert rich.prompts == (Prompt("two cats", "dogs", {"tag": "counting"}), Prompt("two cats"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", "holds no prompts"),
        ("p.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("p.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("p.jsonl", b'{"prompt": "a"}', 'needs a "text"'),
        ("p.jsonl", b'{"text": "a", "meta": {}}', "unknown key 'meta'"),
        ("p.csv", b"a", "must end in"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        PromptSet.read(tmp_path / name)
    with pytest.raises(ValueError, match="there is no prompts file"):
        PromptSet.read(tmp_path / "elsewhere.txt")


def test_a_step_is_a_pure_function_and_an_epoch_shows_every_prompt_once() -> None:
    prompts = PromptSet(tuple(Prompt(str(i)) for i in range(10)))
    drawn = [prompts.at(seed=3, step=step, count=4) for step in range(5)]  # two epochs
    assert drawn[2] == prompts.at(seed=3, step=2, count=4)
    texts = [prompt.text for batch in drawn for prompt in batch]
    assert sorted(texts[:10]) == sorted(texts[10:]) == sorted(str(i) for i in range(10))
    assert texts[:10] != texts[10:]
    assert drawn != [prompts.at(seed=4, step=step, count=4) for step in range(5)]


def test_a_step_may_be_larger_than_the_set() -> None:
    prompts = PromptSet(tuple(Prompt(str(i)) for i in range(3)))
    assert len(prompts.at(seed=0, step=0, count=8)) == 8
    assert [prompt.text for prompt in prompts.first(5)] == ["0", "1", "2", "0", "1"]
