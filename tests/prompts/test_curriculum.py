"""Prompts by weight: exact shares, no state, and the permutation untouched where there are none."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlalign.mdp.noise import Noise
from rlalign.prompts import PromptSet
from rlalign.prompts.curriculum import Weights, chosen, value_at
from rlalign.types import Prompt

EASY, HARD = [Prompt(f"easy {n}", metadata={"tag": "easy"}) for n in range(6)], [Prompt(f"hard {n}") for n in range(4)]
PROMPTS = (*EASY, *(replace(prompt, metadata={"tag": "hard"}) for prompt in HARD))


def counts(prompts: PromptSet, steps: range, count: int, seed: int = 0) -> Counter[str]:
    return Counter(prompt.text for step in steps for prompt in prompts.at(seed, step, count))


def test_without_weights_the_permutation_stays() -> None:
    plain, weighted = PromptSet(PROMPTS), PromptSet(PROMPTS, weights=Weights((1.0,) * 10))
    assert [weighted.at(3, step, 4) for step in range(5)] == [plain.at(3, step, 4) for step in range(5)]


def test_draws_are_in_proportion() -> None:
    prompts = PromptSet(PROMPTS, weights=Weights((1.0,) * 6 + (4.0, 2.0, 1.0, 0.0)))
    found = counts(prompts, range(2600), count=2)  # expected 5200 * weight / 13
    for prompt, weight in zip(PROMPTS, prompts.weights.own, strict=True):
        assert found[prompt.text] == pytest.approx(400 * weight, abs=70)
    assert found["hard 3"] == 0


def test_a_step_is_a_pure_function_and_repeats_nothing_that_it_need_not() -> None:
    prompts = PromptSet(PROMPTS, weights=Weights((1.0,) * 9 + (2.0,)))
    first = prompts.at(seed=5, step=7, count=5)
    assert first == prompts.at(seed=5, step=7, count=5)
    assert first != prompts.at(seed=6, step=7, count=5) and first != prompts.at(seed=5, step=8, count=5)
    for step in range(50):
        texts = Counter(prompt.text for prompt in prompts.at(0, step, 5))
        assert max(texts.values()) == 1  # the heaviest is expected 10 / 11 times


def test_whole_expectations_are_met_in_every_step() -> None:
    weights = np.array([1.0, 0.0, 2.0, 1.0])
    for step in range(30):
        assert Counter(chosen(weights, Noise(0), step, 8)) == {0: 2, 2: 4, 3: 2}


def test_weights_of_tags_change_over_the_steps() -> None:
    weights = Weights().tagged({"easy": [(0, 1.0), (10, 0.0)], "hard": [(0, 0.0), (10, 1.0)]}, PROMPTS)
    prompts = PromptSet(PROMPTS, weights=weights)
    assert {prompt.metadata["tag"] for prompt in prompts.at(0, 0, 6)} == {"easy"}
    assert {prompt.metadata["tag"] for prompt in prompts.at(0, 99, 4)} == {"hard"}
    middle = weights.at(5, PROMPTS)
    assert middle.tolist() == [0.5] * 10
    assert value_at([(10, 2.0), (20, 4.0)], 15) == 3 and value_at([(10, 2.0), (20, 4.0)], 0) == 2
    assert value_at(0.25, 1000) == 0.25


def test_a_weight_of_a_line_times_that_of_its_tag(tmp_path: Path) -> None:
    lines = ['{"text": "a", "weight": 2, "metadata": {"tag": "x"}}', '{"text": "b"}']
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    prompts = PromptSet.read(tmp_path / "p.jsonl")
    assert prompts.weights.own == (2.0, 1.0)
    assert prompts.weights.tagged({"x": 3.0}, prompts.prompts).at(0, prompts.prompts).tolist() == [6, 1]


def test_what_leaves_nothing_to_draw_is_named() -> None:
    with pytest.raises(ValueError, match=r"tag 'hrad', which no training prompt has; they have easy, hard"):
        Weights().tagged({"hrad": 1.0}, PROMPTS)
    with pytest.raises(ValueError, match="no training prompt has; write"):
        Weights().tagged({"easy": 1.0}, [Prompt("a")])
    with pytest.raises(ValueError, match="all training prompts are 0 at step 10"):
        Weights().tagged({"easy": [(0, 1.0), (10, 0.0)], "hard": 0.0}, PROMPTS)
