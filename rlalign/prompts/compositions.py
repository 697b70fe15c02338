"""A grammar of prompts in GenEval's six tasks (https://arxiv.org/abs/2310.11513), with GenEval's metadata.

Classes, colours, counts, relations and tags are GenEval's, so that the reward `geneval` can score them; the wordings
are rlalign's own, but for its plain "a photo of". A composition is a number, whose digits say which classes, colours
and relation; so is its wording.

    single_object  a dog                       colors      a red bench
    two_object     a dog and a kite            position    a dog left of a kite
    counting       three dogs                  color_attr  a red bench and a blue kite
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from rlalign.types import Prompt
from rlalign_rewards.composition import TASKS

Clause = dict[str, Any]

# COCO's 80, by GenEval's names: https://cocodataset.org
CLASSES = [
    name.strip()
    for name in """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
    laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator,
    book, clock, vase, scissors, teddy bear, hair drier, toothbrush
    """.split(",")  # noqa: SIM905 (a table of words reads better than a list of strings)
]
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")

_COLORABLE = [name for name in CLASSES if name != "person"]  # GenEval asks for no coloured people either
# What one and what several are called, where that is not the name and the name with an s; {} is where a colour goes.
_NOUNS = {
    "person": ("{}person", "{}people"),
    "bus": ("{}bus", "{}buses"),
    "bench": ("{}bench", "{}benches"),
    "sheep": ("{}sheep", "{}sheep"),
    "skis": ("pair of {}skis", "pairs of {}skis"),
    "wine glass": ("{}wine glass", "{}wine glasses"),
    "knife": ("{}knife", "{}knives"),
    "sandwich": ("{}sandwich", "{}sandwiches"),
    "broccoli": ("head of {}broccoli", "heads of {}broccoli"),
    "couch": ("{}couch", "{}couches"),
    "computer mouse": ("{}computer mouse", "{}computer mice"),
    "scissors": ("pair of {}scissors", "pairs of {}scissors"),
    "toothbrush": ("{}toothbrush", "{}toothbrushes"),
}
_FRAMES = (
    "a photo of {}",
    "a photograph showing {}",
    "a picture of {}",
    "an image of {}",
    "{}",
    "a realistic photo of {}",
    "a snapshot of {}",
    "a clear shot of {}",
)
_PLACED = {
    "left of": ("{a} left of {b}", "{a} to the left of {b}", "{a} on the left and {b} on the right"),
    "right of": ("{a} right of {b}", "{a} to the right of {b}", "{a} on the right and {b} on the left"),
    "above": ("{a} above {b}", "{a} higher up than {b}", "{a} at the top and {b} at the bottom"),
    "below": ("{a} below {b}", "{a} lower down than {b}", "{a} at the bottom and {b} at the top"),
}
_JOINED = ("{a} and {b}", "{a} together with {b}", "{a} next to {b}")


@dataclass(frozen=True, slots=True)
class Task:
    """A task's parts, what a point of them asks for, and how many ways there are to say how two things stand."""

    axes: tuple[int, ...]  # choices of each part
    include: Callable[..., list[Clause] | None]  # None where parts do not go together
    phrasings: int = 1


def _single(a: int) -> list[Clause]:
    return [{"class": CLASSES[a], "count": 1}]


def _two(a: int, b: int) -> list[Clause] | None:
    return None if a == b else [{"class": CLASSES[a], "count": 1}, {"class": CLASSES[b], "count": 1}]


def _counting(a: int, number: int) -> list[Clause]:
    return [{"class": CLASSES[a], "count": list(COUNTS)[number]}]


def _color(a: int, color: int) -> list[Clause] | None:
    name, of = _COLORABLE[a], COLORS[color]
    return None if name == of else [{"class": name, "count": 1, "color": of}]  # an orange orange


def _position(a: int, b: int, relation: int) -> list[Clause] | None:
    """GenEval's order: the place is told of the second clause, which the prompt names first."""
    if a == b:
        return None
    return [{"class": CLASSES[b], "count": 1}, {"class": CLASSES[a], "count": 1, "position": [RELATIONS[relation], 0]}]


def _color_attr(a: int, b: int, color_a: int, color_b: int) -> list[Clause] | None:
    one, other = _color(a, color_a), _color(b, color_b)
    return None if a == b or color_a == color_b or one is None or other is None else [*one, *other]


SPACES: dict[str, Task] = {
    "single_object": Task((len(CLASSES),), _single),
    "two_object": Task((len(CLASSES), len(CLASSES)), _two, len(_JOINED)),
    "counting": Task((len(CLASSES), len(COUNTS)), _counting),
    "colors": Task((len(_COLORABLE), len(COLORS)), _color),
    "position": Task((len(CLASSES), len(CLASSES), len(RELATIONS)), _position, len(_PLACED["above"])),
    "color_attr": Task((len(_COLORABLE), len(_COLORABLE), len(COLORS), len(COLORS)), _color_attr, len(_JOINED)),
}
assert tuple(SPACES) == TASKS


def sizes(task: str) -> tuple[int, int]:
    """Numbers of a task's compositions, a few of which are none, and of the wordings of each."""
    return prod(SPACES[task].axes), len(_FRAMES) * SPACES[task].phrasings


def prompt(task: str, number: int, wording: int) -> Prompt | None:
    """That composition in those words, None where its parts do not go together."""
    rest, point = number, list[int]()
    for choices in SPACES[task].axes:
        rest, choice = divmod(rest, choices)
        point.append(choice)
    include = SPACES[task].include(*point)
    if include is None:
        return None
    metadata: dict[str, Any] = {"tag": task, "include": include}
    if task == "counting":
        metadata["exclude"] = [{**include[0], "count": include[0]["count"] + 1}]
    frame, phrasing = divmod(wording, SPACES[task].phrasings)
    return Prompt(_FRAMES[frame].format(_phrase(include, phrasing)), metadata=metadata)


def _phrase(include: list[Clause], phrasing: int) -> str:
    nouns = [_noun(clause) for clause in include]
    if len(nouns) == 1:
        return nouns[0]
    if "position" in include[1]:
        return _PLACED[include[1]["position"][0]][phrasing].format(a=nouns[1], b=nouns[0])
    return _JOINED[phrasing].format(a=nouns[0], b=nouns[1])


def _noun(clause: Clause) -> str:
    """an apple, a red bench, three pairs of scissors"""
    one, several = _NOUNS.get(clause["class"], (f"{{}}{clause['class']}", f"{{}}{clause['class']}s"))
    color = f"{clause['color']} " if "color" in clause else ""
    if clause["count"] > 1:
        return f"{COUNTS[clause['count']]} {several.format(color)}"
    phrase = one.format(color)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
