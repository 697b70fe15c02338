"""The generator says in words what it paints, and paints what the catalogue's rewards read."""

import numpy as np
import pytest
import torch

from rlalign.types import Prompt
from rlalign.zoo.scenes import NUMBERS, WORDS, Metadata, caption, composition_key, compositions, draw
from rlalign_rewards.composition import TASKS

RED = {"class": "circle", "count": 1, "color": "red"}
BLUE = {"class": "square", "count": 1, "color": "blue"}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"tag": "single_object", "include": [{"class": "cross", "count": 1}]}, "a cross"),
        ({"tag": "counting", "include": [{"class": "cross", "count": 3}]}, "three crosses"),
        ({"tag": "counting", "include": [RED | {"count": 2}]}, "two red circles"),
        ({"tag": "color_attr", "include": [RED, BLUE]}, "a red circle and a blue square"),
        (
            {"tag": "position", "include": [BLUE, RED | {"position": ["left of", 0]}]},
            "a red circle left of a blue square",
        ),
        ({"tag": "text", "text": "42"}, 'the text "42"'),
    ],
)
def test_caption(metadata: Metadata, words: str) -> None:
    assert caption(metadata) == words


def test_number_of_compositions() -> None:
    count = {task: len({composition_key(metadata) for metadata in compositions(task)}) for task in TASKS}
    assert count == {
        "single_object": 4,
        "two_object": 6,
        "counting": 4 * 3 * 8,
        "colors": 28,
        "position": 6 * 42 * 4,
        "color_attr": 6 * 42,
    }


def test_the_same_scene_in_other_words_has_the_same_key() -> None:
    left = {"tag": "position", "include": [BLUE, RED | {"position": ["left of", 0]}]}
    right = {"tag": "position", "include": [RED, BLUE | {"position": ["right of", 0]}]}
    above = {"tag": "position", "include": [BLUE, RED | {"position": ["above", 0]}]}
    assert composition_key(left) == composition_key(right) != composition_key(above)
    pair = [{"tag": "color_attr", "include": include} for include in ([RED, BLUE], [BLUE, RED])]
    assert composition_key(pair[0]) == composition_key(pair[1])


@pytest.mark.parametrize(
    "metadata", [{"tag": "text", "text": "WAX"}, {"tag": "counting", "include": [RED | {"count": 4}]}]
)
def test_drawing_is_seeded(metadata: Metadata) -> None:
    first, again, other = (draw(metadata, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8
    assert (first == again).all() and (first != other).any()


def test_drawn_texts_are_read() -> None:
    ocr = pytest.importorskip("rlalign_rewards.ocr", reason="needs the extra rlalign[ocr]").ocr
    rng = np.random.default_rng(0)
    scenes = [{"tag": "text", "text": text} for text in [*WORDS[::3], *NUMBERS[::40]]]
    images = torch.from_numpy(np.stack([draw(metadata, rng) for metadata in scenes])).permute(0, 3, 1, 2)
    scores = ocr(images, [Prompt(caption(metadata), metadata=metadata) for metadata in scenes])
    assert scores["score"].mean() > 0.9
