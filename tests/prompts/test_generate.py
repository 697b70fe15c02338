"""The grammars: what is asked for can be scored, and what is held out is nowhere in training."""

import re
from collections import Counter

import pytest

from rlalign.prompts.compositions import CLASSES, COLORS, SPACES, prompt, sizes
from rlalign.prompts.generate import GRAMMARS, Kind, generate
from rlalign.prompts.matching import identity
from rlalign.types import Prompt
from rlalign_rewards import geneval, ocr


@pytest.mark.parametrize("kind", GRAMMARS)
def test_nothing_held_out_is_in_training(kind: Kind) -> None:
    train, heldout = (generate(kind, num, seed=0, share=0.2, heldout=side) for num, side in ((800, False), (60, True)))
    assert len({prompt.text for prompt in train}) == 800
    assert len({identity(prompt) for prompt in heldout}) == 60
    assert not {identity(prompt) for prompt in train} & {identity(prompt) for prompt in heldout}
    assert {prompt.metadata["tag"] for prompt in train} == set(GRAMMARS[kind].tasks)


@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_seed_is_a_file_and_more_of_it_begins_with_less(kind: Kind) -> None:
    few = generate(kind, 50, seed=3, share=0.1, heldout=False)
    assert generate(kind, 80, seed=3, share=0.1, heldout=False)[:50] == few
    assert generate(kind, 50, seed=4, share=0.1, heldout=False) != few


def test_tasks_take_turns_until_one_runs_out() -> None:
    tags = Counter(prompt.metadata["tag"] for prompt in generate("geneval", 5000, 0, 0.1, heldout=False))
    assert 500 < tags["single_object"] < 640 < tags["color_attr"] <= tags["two_object"] <= tags["color_attr"] + 1
    with pytest.raises(ValueError, match=r"the grammar ocr has only \d+ held-out prompts, fewer than 5000"):
        generate("ocr", 5000, 0, 0.01, heldout=True)


def prompts_of(task: str) -> list[Prompt]:
    things, wordings = sizes(task)
    numbers = range(0, things * wordings, max(1, things * wordings // 4000))
    found = [prompt(task, *divmod(number, wordings)) for number in numbers]
    return [one for one in found if one is not None]


SEVERAL = {"person": "people", "knife": "knives", "computer mouse": "computer mice"}


@pytest.mark.parametrize("task", SPACES)
def test_the_words_say_what_the_metadata_asks(task: str) -> None:
    for one in prompts_of(task):
        for clause in one.metadata["include"]:
            name = clause["class"]
            assert name in one.text or (clause["count"] > 1 and SEVERAL[name] in one.text)
            assert clause.get("color", "") in one.text
        assert not re.search(r"\ba (?=[aeiou])|\ban (?=[^aeiou])|[{}]|  ", one.text), one.text


def test_by_hand() -> None:
    found = {one.text: one.metadata for task in SPACES for one in prompts_of(task)}
    counted = found["a photo of three pairs of scissors"]
    assert counted["include"] == [{"class": "scissors", "count": 3}]
    assert counted["exclude"] == [{"class": "scissors", "count": 4}]
    assert found["an orange umbrella"]["include"] == [{"class": "umbrella", "count": 1, "color": "orange"}]
    assert not any("red person" in text or "orange orange" in text for text in found)


def test_the_place_is_told_of_the_thing_that_is_named_first() -> None:
    """By the reward's own rules, on boxes that stand where the prompt says and the other way round."""
    said = {
        "on the left and": "left of",
        "on the right and": "right of",
        "at the top and": "above",
        "at the bottom and": "below",
        "higher up than": "above",
        "lower down than": "below",
        "left of": "left of",
        "right of": "right of",
        "above": "above",
        "below": "below",
    }
    places = {"left of": (0, 50), "right of": (90, 50), "above": (50, 0), "below": (50, 90)}
    for one in prompts_of("position")[::20]:
        words = next(words for words in said if words in one.text)
        first, second = (
            max((clause["class"] for clause in one.metadata["include"] if clause["class"] in half), key=len)
            for half in one.text.split(words)
        )

        def found(x: float, y: float, first: str = first, second: str = second) -> geneval.Groups:
            boxes = {first: (x, y, x + 10, y + 10), second: (50, 50, 60, 60)}
            return {geneval.canonical(name): [geneval.Found(name, 0.9, box)] for name, box in boxes.items()}

        x, y = places[said[words]]
        assert all(geneval.checked(found(x, y), one.metadata, lambda things, label: [])), one
        assert not all(geneval.checked(found(90 - x, 90 - y), one.metadata, lambda things, label: [])), one


def test_the_rewards_know_every_word() -> None:
    assert set(COLORS) == set(geneval.COLORS) and set(SPACES) == set(geneval.TASKS)
    assert len(set(CLASSES)) == 80
    for one in generate("ocr", 200, 0, 0.1, heldout=False):
        assert ocr.asked_text(one) == ocr.asked_text(Prompt(one.text)) == one.metadata["text"]
