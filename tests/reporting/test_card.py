"""What a model card concludes from a run's numbers, and what it does not tell."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlalign.reporting.card import MARK, Exported, _prompts, _shortened, remarks, require_ours, write_card
from rlalign.reporting.licence import declared, front_matter, sentence
from tests.reporting.example import config, example_run

TRAIN = {"name": "composition", "use": "composition", "role": "train", "weight": 1.0}
HELD = {"name": "jpeg", "use": "jpeg", "role": "heldout", "weight": 1.0}


def said(rewards: list[dict[str, Any]], alarms: tuple[str, ...] = (), **numbers: tuple[float, ...]) -> str:
    held_out = {name.replace("__", "/"): dict(enumerate(values)) for name, values in numbers.items()}
    return " ".join(remarks(rewards, held_out, alarms))


def test_a_gain_that_nothing_watched_is_no_evidence():
    words = said([TRAIN], reward__mean=(0.4, 0.7))
    assert (
        "rose 0.400" in words.replace("from ", "") and "nothing here tells a better model from a fooled reward" in words
    )


def test_what_fell_is_named():
    words = said([TRAIN, HELD], reward__mean=(0.4, 0.7), reward__jpeg__mean=(-1.0, -2.0))
    assert "What was not trained for and fell: `jpeg`." in words
    words = said([TRAIN, HELD], reward__mean=(0.4, 0.3), reward__jpeg__mean=(-1.0, -1.0))
    assert "fell from 0.400 to 0.300" in words and "not trained for" not in words


def test_a_change_in_the_fourth_digit_is_none():
    assert "stayed as it was" in said([TRAIN], reward__mean=(0.4, 0.4001))


def test_narrowing_and_alarms_are_told():
    words = said([TRAIN], ("collapse", "collapse"), reward__mean=(0.4, 0.7), diversity=(1.0, 0.5))
    assert "0.50 times as far apart" in words and "the model has narrowed" in words
    assert words.count("`collapse`") == 1
    assert "narrowed" not in said([TRAIN], diversity=(1.0, 0.9))


def test_without_evaluation_there_is_no_evidence():
    assert "no evidence that it improved anything" in said([TRAIN])
    assert "nothing can be compared" in said([TRAIN], reward__mean=(0.4,))


def test_paths_and_tokens_are_left_out():
    tree = {
        "rewards": [{"use": "/home/me/r.py:red", "options": {"api_key": "s3cret", "token_env": "RED_TOKEN", "n": 2}}],
        "prompts": {"train": "/home/me/train.txt"},
    }
    assert _shortened(tree) == {
        "rewards": [{"use": "r.py:red", "options": {"api_key": "left out", "token_env": "RED_TOKEN", "n": 2}}],
        "prompts": {"train": "train.txt"},
    }


def test_where_prompts_come_from_is_told_in_names():
    files = {"train": "/x/train.txt", "heldout": "/x/held.txt", "test": None, "split_seed": 0, "weights": {}}
    assert _prompts(files) == "`train.txt` (train), `held.txt` (heldout)"
    sets = {"train": {"dataset": "my/set", "path": None}, "heldout": 0.1, "test": {"dataset": None, "path": "/x/t.txt"}}
    assert _prompts(sets) == "`my/set` (train), 10% of train (heldout), `t.txt` (test)"


def test_the_licence_is_that_of_the_base_models_card(tmp_path: Path):
    assert declared(None) == declared(tmp_path) == {}
    for text in ("# no front matter", "---\nlicense: [broken\n---\n", "---\n- a list\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert declared(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# X\n---\nlicense: mit\n")
    assert declared(tmp_path) == {"license": "apache-2.0"}
    assert sentence({"license": "apache-2.0"}).endswith("declares: apache-2.0.")
    assert "look it up" in sentence({})


def test_a_card_of_a_run_that_goes_on(tmp_path: Path):
    """Half of the steps, no last evaluation: the curve so far, and the newest numbers."""
    with example_run(tmp_path / "run", steps=12, done=6) as run:
        whole = {**config(12), "prompts": {"train": "/x/train.txt", "heldout": "/x/held.txt"}}
        whole |= {"rewards": [TRAIN, HELD], "evaluation": {"weights": "policy"}}
        run.files.config.write_text(yaml.safe_dump(whole))
    exported = Exported("A LoRA", "adapter", "ema", 5, "python", "pipe = 1", "GRPO (arXiv 2505.05470)", None, None)
    card, picture = write_card(tmp_path / "run", tmp_path / "out" / "README.md", exported)
    text = card.read_text()
    assert front_matter(text)["tags"][0] == "lora" and picture.read_bytes().startswith(b"\x89PNG")
    assert "| `reward/composition/mean` | 0.330 | 0.403 | +0.073 |" in text
    assert "The run raised alarms: `clip_saturation`." in text and "```python\npipe = 1\n```" in text
    assert "| | before | after 4 updates | change |" in text
    assert "Evaluated were the `policy` weights; exported are the `ema` ones." in text
    assert "Evaluated were the weights after 4 updates; exported are those after 5." in text
    assert "fine-tuned by online reinforcement learning" in text and "On held-out prompts, from the same noise" in text
    assert text.endswith(f"{MARK}\n") and "\n\n\n" not in text
    assert write_card(tmp_path / "run", card, exported) == [card, picture]
    card.write_text("by hand")
    with pytest.raises(ValueError, match="rlalign did not write it"):
        require_ours(card)


def test_recorded_images_are_no_online_learning(tmp_path: Path):
    with example_run(tmp_path / "run", steps=2, done=2) as run:
        whole = {**config(2), "prompts": {"train": "/x/pairs.jsonl"}, "rewards": [TRAIN], "rollout": {"source": "data"}}
        run.files.config.write_text(yaml.safe_dump(whole))
    exported = Exported("A LoRA", "adapter", "policy", 2, "python", "pipe = 1", "DPO", None, None)
    text = write_card(tmp_path / "run", tmp_path / "README.md", exported)[0].read_text()
    assert "fine-tuned on recorded images with rlalign" in text
    assert front_matter(text)["tags"] == ["lora", "rlalign", "grpo"]
