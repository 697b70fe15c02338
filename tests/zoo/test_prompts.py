"""What is held out is never drawn in pretraining nor asked in training, in no wording."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.zoo.prompts import FOLDER, composition_prompts, heldout_keys, pretraining_scene, text_prompts, write
from rlalign.zoo.scenes import Metadata, composition_key
from rlalign_rewards.composition import TASKS


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def keys(name: str) -> set[tuple[Any, ...]]:
    return {(row["metadata"]["tag"], *composition_key(row["metadata"])) for row in rows(name)}


def test_train_and_heldout_compositions_are_disjoint() -> None:
    assert len(keys("heldout")) == len(rows("heldout")) == 128
    assert len(keys("train")) == len(rows("train")) == 512
    assert not keys("train") & keys("heldout")
    assert {key[0] for key in keys("heldout")} == set(TASKS)


def test_train_and_heldout_texts_are_disjoint() -> None:
    train, heldout = ({row["metadata"]["text"] for row in rows(f"ocr_{name}")} for name in ("train", "heldout"))
    assert len(heldout) == 40 and len(train) == 180 and not train & heldout


def test_pretraining_draws_nothing_held_out() -> None:
    rng = np.random.default_rng(0)
    texts = {metadata["text"] for metadata in text_prompts(heldout=True)}
    for metadata in (pretraining_scene(rng) for _ in range(4000)):
        if metadata["tag"] == "text":
            assert metadata["text"] not in texts
        else:
            assert composition_key(metadata) not in heldout_keys(metadata["tag"])


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("train", composition_prompts(heldout=False)),
        ("heldout", composition_prompts(heldout=True)),
        ("ocr_train", text_prompts(heldout=False)),
        ("ocr_heldout", text_prompts(heldout=True)),
    ],
)
def test_the_files_are_what_the_module_writes(name: str, prompts: list[Metadata], tmp_path: Path) -> None:
    write(tmp_path / "prompts.jsonl", prompts)
    assert (tmp_path / "prompts.jsonl").read_text() == (FOLDER / f"{name}.jsonl").read_text()
