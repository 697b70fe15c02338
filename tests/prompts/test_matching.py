"""When two prompts ask for the same."""

import pytest

from rlalign.prompts.compositions import COLORS
from rlalign.prompts.matching import _ALIASES, identity, plain, shared, side
from rlalign.types import Prompt
from rlalign_rewards import geneval


def asking(*include: dict[str, object], text: str = "whatever", tag: str = "position") -> Prompt:
    return Prompt(text, metadata={"tag": tag, "include": list(include)})


DOG, KITE = {"class": "dog", "count": 1}, {"class": "kite", "count": 1}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (asking(DOG, KITE), asking(KITE, DOG, text="a kite and a dog")),
        (asking(DOG, {**KITE, "position": ["left of", 0]}), asking(KITE, {**DOG, "position": ["right of", 0]})),
        (asking(DOG, {**KITE, "position": ["above", 0]}), asking({**DOG, "position": ["below", 1]}, KITE)),
        (asking(DOG, DOG), asking({**DOG, "count": 2}, tag="counting")),
        (asking({"class": "mouse", "count": 1}), asking({"class": "computer mouse", "count": 1})),
        (Prompt("A  red circle."), Prompt("a red\tcircle")),
        (Prompt("a sign", metadata={"text": "OPEN now"}), Prompt("a cake", metadata={"text": "Open Now"})),
        (Prompt("blue", files={"image": "/here/a.png"}), Prompt("Blue!", files={"image": "/there/a.png"})),
    ],
)
def test_the_same_in_other_words(one: Prompt, other: Prompt) -> None:
    assert identity(one) == identity(other)
    assert shared([one], [Prompt("something else"), other]) == [one]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (asking(DOG, {**KITE, "position": ["left of", 0]}), asking(KITE, {**DOG, "position": ["left of", 0]})),
        (asking(DOG, {**KITE, "position": ["left of", 0]}), asking(DOG, {**KITE, "position": ["above", 0]})),
        (asking(DOG, KITE), asking(DOG, {**KITE, "count": 2})),
        (asking({**DOG, "color": "red"}, KITE), asking(DOG, {**KITE, "color": "red"})),
        (Prompt("a cat"), Prompt("a cat and a dog")),
        (Prompt("a sign", metadata={"text": "C"}), Prompt("a sign", metadata={"text": "C++"})),
        (Prompt("blue", files={"image": "a.png"}), Prompt("blue", files={"image": "b.png"})),
        (asking({"class": "dog", "position": ["left of", 7]}, text="a"), asking({"class": "dog"}, text="b")),
    ],
)
def test_other_wishes(one: Prompt, other: Prompt) -> None:
    assert identity(one) != identity(other) and not shared([one], [other])


@pytest.mark.parametrize("more", [{"color": ["red", "brown"]}, {"position": ["above", 0.0]}, {"position": "above"}])
def test_metadata_of_others_is_left_alone(more: dict[str, object]) -> None:
    strange = asking({"class": "dog", **more}, text="a dog")
    assert identity(strange) == identity(Prompt("a dog")) != identity(asking({"class": "dog"}, text="a dog"))


def test_a_text_of_nothing_but_punctuation_is_itself() -> None:
    assert plain(" ?! ") == "?!"


def test_a_side_depends_on_the_key_and_the_seed_alone() -> None:
    places = [side(f"prompt {number}", seed=0) for number in range(2000)]
    assert places == [side(f"prompt {number}", seed=0) for number in range(2000)]
    assert all(0 <= place < 1 for place in places)
    assert sum(place < 0.1 for place in places) == pytest.approx(200, abs=50)
    assert places != [side(f"prompt {number}", seed=1) for number in range(2000)]


def test_names_are_those_of_the_reward() -> None:
    """It stands above transformers, which nothing else may import, so that the words stand twice."""
    assert _ALIASES == geneval._ALIASES and COLORS == geneval.COLORS
