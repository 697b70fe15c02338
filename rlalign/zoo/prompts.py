"""The prompts of the scenes pipeline: which compositions and texts are held out, and the files that recipes read.

A composition is held out whole: no wording of it, in any order, is in the training prompts or drawn in pretraining.
`python -m rlalign.zoo.prompts` writes `rlalign/recipes/prompts/*.jsonl`.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from rlalign.zoo.scenes import NUMBERS, WORDS, Metadata, caption, composition_key, compositions
from rlalign_rewards.composition import TASKS

FOLDER = Path(__file__).parent.parent / "recipes" / "prompts"
SEED = 0
# Compositions per task; the hard tasks have most.
HELDOUT = {"single_object": 1, "two_object": 1, "counting": 20, "colors": 6, "position": 60, "color_attr": 40}
TRAIN = {"single_object": 3, "two_object": 5, "counting": 76, "colors": 22, "position": 246, "color_attr": 160}
HELDOUT_TEXTS = {"numbers": 24, "words": 16}
TRAIN_TEXTS = {"numbers": 120, "words": 60}
# Shares of the scenes that pretraining draws.
PRETRAINING = {
    "single_object": 0.06,
    "two_object": 0.08,
    "counting": 0.16,
    "colors": 0.1,
    "position": 0.2,
    "color_attr": 0.15,
    "text": 0.25,
}


@cache
def heldout_keys(task: str) -> frozenset[tuple[Any, ...]]:
    """The compositions of a task that nothing is ever trained on."""
    keys = sorted({composition_key(metadata) for metadata in compositions(task)})
    order = np.random.default_rng((SEED, TASKS.index(task))).permutation(len(keys))
    return frozenset(keys[index] for index in order[: HELDOUT[task]])


def split(task: str, *, heldout: bool) -> list[Metadata]:
    """All wordings of the held-out compositions, or of the others."""
    return [metadata for metadata in compositions(task) if (composition_key(metadata) in heldout_keys(task)) == heldout]


@cache
def split_texts(kind: str, *, heldout: bool) -> list[str]:
    """The held-out words or numbers, or the others."""
    texts = {"numbers": NUMBERS, "words": WORDS}[kind]
    order = np.random.default_rng((SEED, len(texts))).permutation(len(texts))
    chosen = order[: HELDOUT_TEXTS[kind]] if heldout else order[HELDOUT_TEXTS[kind] :]
    return [texts[index] for index in chosen]


def composition_prompts(*, heldout: bool) -> list[Metadata]:
    """One wording, picked at random, of each of a task's quota of compositions."""
    rng = np.random.default_rng((SEED, 1, heldout))
    quotas = HELDOUT if heldout else TRAIN
    return [metadata for task in TASKS for metadata in _one_wording_each(task, quotas[task], heldout, rng)]


def _one_wording_each(task: str, quota: int, heldout: bool, rng: np.random.Generator) -> list[Metadata]:
    wordings = split(task, heldout=heldout)
    shuffled = [wordings[index] for index in rng.permutation(len(wordings))]
    return list({composition_key(metadata): metadata for metadata in shuffled}.values())[:quota]


def text_prompts(*, heldout: bool) -> list[Metadata]:
    """Words and numbers to render."""
    quotas = HELDOUT_TEXTS if heldout else TRAIN_TEXTS
    texts = [text for kind, quota in quotas.items() for text in split_texts(kind, heldout=heldout)[:quota]]
    return [{"tag": "text", "text": text} for text in texts]


def pretraining_scene(rng: np.random.Generator) -> Metadata:
    """What pretraining draws: any wording that is not held out, and texts, with random letters among them."""
    task = str(rng.choice(list(PRETRAINING), p=list(PRETRAINING.values())))
    if task == "text":
        return {"tag": "text", "text": _pretraining_text(rng)}
    wordings = _pretraining_wordings(task)
    return wordings[rng.integers(len(wordings))]


def _pretraining_text(rng: np.random.Generator) -> str:
    kind = rng.choice(["numbers", "words", "letters"], p=[0.5, 0.3, 0.2])
    if kind != "letters":
        return str(rng.choice(split_texts(kind, heldout=False)))
    text = "".join(rng.choice(list(ascii_uppercase), rng.integers(1, 4)))
    return _pretraining_text(rng) if text in split_texts("words", heldout=True) else text


@cache
def _pretraining_wordings(task: str) -> list[Metadata]:
    return split(task, heldout=False)


def write(path: Path, prompts: Sequence[Metadata]) -> None:
    """One JSON object a line: text and metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": caption(metadata), "metadata": metadata}) for metadata in prompts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    """Write the four prompt files of the recipes."""
    for name, heldout in (("train", False), ("heldout", True)):
        write(FOLDER / f"{name}.jsonl", composition_prompts(heldout=heldout))
        write(FOLDER / f"ocr_{name}.jsonl", text_prompts(heldout=heldout))


if __name__ == "__main__":
    main()
