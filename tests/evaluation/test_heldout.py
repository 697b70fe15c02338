import math

import pytest
import torch

from rlalign.evaluation.heldout import EvaluationConfig, evaluate, summary
from rlalign.prompts import PromptSet, evenly
from rlalign.runtime.local import LocalPool
from rlalign.types import Prompt, RewardScores, Scores, Unit
from rlalign.workers.scorer import group_distance, nearest, pixel_distances
from tests.small import algorithm, rollout_config, workers


class Brightness:
    """Scores every picture by its first pixel."""

    def score(self, images: torch.Tensor, unit: Unit, roles: tuple[str, ...]) -> Scores:
        values = images[:, 0, 0, 0].float().reshape(len(unit.prompts), unit.samples)
        reward = RewardScores(values, torch.ones_like(values, dtype=torch.bool), "train", 1.0)
        return Scores({"first": reward}, distance=group_distance(pixel_distances(images, unit.samples)))


def test_evaluation_is_the_same_whenever_it_is_asked_for_and_shows_what_it_judged() -> None:
    sampler, _ = workers(algorithm())
    samplers, scorers = LocalPool("sampler", [sampler], 1), LocalPool("scorer", [Brightness()], 1)
    prompts = PromptSet(tuple(Prompt(str(i)) for i in range(20)))
    settings = EvaluationConfig(num_images=80, num_steps=4)
    one = evaluate(samplers, scorers, prompts, settings, rollout_config())
    sampler.version = 7
    two = evaluate(samplers, scorers, prompts, settings, rollout_config())
    assert one.metrics == two.metrics and torch.equal(one.pictures, two.pictures)
    assert one.captions == ["0", "2", "5", "7", "10", "12", "15", "17"]
    unit = Unit(0, (5,), (Prompt("5"),), 4, "evaluation")
    _, again = sampler.sample(unit, settings.rollout(rollout_config()), "policy")
    assert torch.equal(one.pictures[2], again)


def test_due_at_the_start_the_end_and_every_few_steps() -> None:
    assert [step for step in range(11) if EvaluationConfig(every=4).due(step, last=10)] == [0, 4, 8, 10]
    assert [step for step in range(11) if EvaluationConfig(every=0).due(step, last=10)] == [0, 10]


def test_invalid_scores_and_details_that_do_not_apply_are_left_out() -> None:
    values, valid = torch.tensor([[1.0, 0.0], [3.0, 5.0]]), torch.tensor([[True, False], [True, True]])
    details = {"task/colors": torch.tensor([[1.0, 1.0], [math.nan, 0.0]])}
    metrics = summary(Scores({"r": RewardScores(values, valid, "train", 2.0, details)}))
    assert metrics == {"reward/mean": 6.0, "reward/r/mean": 3.0, "task/colors": 0.5}


@pytest.mark.parametrize(("number", "places"), [(3, (0, 1, 2)), (8, tuple(range(8))), (80, tuple(range(0, 80, 10)))])
def test_shown_prompts_are_spread_evenly(number: int, places: tuple[int, ...]) -> None:
    assert evenly(number, 8) == places


def test_a_few_prompts_are_judged_from_all_over_the_file() -> None:
    """Files are often sorted by task."""
    prompts = PromptSet(tuple(Prompt(str(i)) for i in range(20)))
    assert [prompt.text for prompt in prompts.spread(4)] == ["0", "5", "10", "15"]
    assert prompts.spread(20) == prompts.first(20) and prompts.spread(30) == prompts.first(30)


def test_group_distance_is_the_mean_pairwise_rms() -> None:
    images = torch.tensor([0, 255, 0], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    assert group_distance(pixel_distances(images, 3)).tolist() == pytest.approx([2 / 3])  # pairs 1, 0, 1
    assert nearest(pixel_distances(images, 3)).tolist() == [pytest.approx([0.0, 1.0, 0.0])]
    alone = pixel_distances(images[:1], 1)
    assert (group_distance(alone).tolist(), nearest(alone).tolist()) == ([0.0], [[0.0]])
