"""Files of prompts from the grammars: drawn without repetition, with whole compositions or texts held out.

What is held out depends on the seed and on what is asked for, not on how many prompts are drawn: no wording of a
held-out composition, in any order, and no setting of a held-out text, is ever in the training part.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rlalign.prompts import compositions, lettering
from rlalign.prompts.matching import identity, side
from rlalign.types import Prompt

Kind = Literal["geneval", "ocr"]


@dataclass(frozen=True, slots=True)
class Grammar:
    """Tasks; how many things a task can ask for and in how many wordings; the prompt for a thing and a wording."""

    tasks: tuple[str, ...]
    sizes: Callable[[str], tuple[int, int]]
    prompt: Callable[[str, int, int], Prompt | None]


GRAMMARS: dict[Kind, Grammar] = {
    "geneval": Grammar(tuple(compositions.SPACES), compositions.sizes, compositions.prompt),
    "ocr": Grammar(lettering.KINDS, lettering.sizes, lettering.prompt),
}


def generate(kind: Kind, num: int, seed: int, share: float, *, heldout: bool) -> list[Prompt]:
    """``num`` prompts of one side, tasks in turn: a task that runs out leaves its turns to the others.

    Of a held-out composition or text there is one wording; in training there may be several. ValueError where the
    grammar has fewer.
    """
    grammar = GRAMMARS[kind]
    streams = {task: _stream(grammar, task, seed, share, heldout) for task in grammar.tasks}
    found: list[Prompt] = []
    while streams and len(found) < num:
        for task in list(streams):
            prompt = next(streams[task], None)
            if prompt is None:
                del streams[task]
            else:
                found.append(prompt)
    if len(found) < num:
        side_name = "held-out" if heldout else "training"
        raise ValueError(
            f"the grammar {kind} has only {len(found)} {side_name} prompts, fewer than {num}; ask for less"
        )
    return found[:num]


def _stream(grammar: Grammar, task: str, seed: int, share: float, heldout: bool) -> Iterator[Prompt]:
    """Prompts of one side in random order: in training every wording of every thing, else one of each."""
    things, wordings = grammar.sizes(task)
    rng = np.random.default_rng((seed, grammar.tasks.index(task), heldout))
    seen: set[str] = set()
    for number in _numbers(things if heldout else things * wordings, rng):
        thing, wording = (number, int(rng.integers(wordings))) if heldout else divmod(number, wordings)
        prompt = grammar.prompt(task, thing, wording)
        if prompt is None:
            continue
        asked = identity(prompt)
        key = asked if heldout else prompt.text
        if (side(asked, seed) < share) == heldout and key not in seen:
            seen.add(key)
            yield prompt


def _numbers(size: int, rng: np.random.Generator, batch: int = 4096) -> Iterator[int]:
    """All of 0..size-1 in random order: by rejection while that is quick, the rest by a permutation."""
    seen: set[int] = set()
    while len(seen) < size / 2:
        for number in rng.integers(size, size=batch).tolist():
            if number not in seen:
                seen.add(number)
                yield number
    yield from rng.permutation(np.setdiff1d(np.arange(size), [*seen])).tolist()
