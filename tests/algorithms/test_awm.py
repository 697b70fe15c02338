"""AWM: the ratio of flow-matching losses, its advantages, the teacher."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rlalign.algorithms.awm import Algorithm, Config
from rlalign.algorithms.base import Loss
from rlalign.algorithms.forward import Ramp
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import RewardScores, Scores

from .chains import WEIGHT, weight
from .gaussians import GRID, data, gradient, moved, passes, tilted

FREE: dict[str, Any] = {"kl_weight": 0.0, "teacher_weight": 0.0, "weighting": "uniform", **GRID}
A = torch.tensor([2.0, -1.0, 0.5, -2.0]).double()


def losses(policy: Policy, rows: int = 4, **config: Any) -> list[Loss]:
    return list(Algorithm(Config(**config)).losses(policy, data(policy, 0, rows=rows), A[:rows], Noise(0)))


def test_advantages_are_scaled_from_the_clamp_to_the_maximum():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 40.0]])
    scores = Scores({"r": RewardScores(rewards, torch.ones(2, 2, dtype=torch.bool), "train", 1.0)})
    config: dict[str, Any] = {"advantage": "center", "adv_clip": 5.0}
    assert Algorithm(Config(**config)).advantages(scores).flatten().tolist() == pytest.approx([-0.1, 0.1, -1, 1])
    unscaled = Algorithm(Config(**config, adv_max=None)).advantages(scores)
    assert unscaled.flatten().tolist() == pytest.approx([-0.5, 0.5, -5, 5])


def test_the_ratio_compares_with_the_weights_that_the_step_began_with():
    policy = moved(tilted(0.0))
    first = losses(policy, updates_per_step=1, **FREE)
    assert all((loss.means["ratio/mean"] == 1).all() for loss in first)
    later = losses(policy, updates_per_step=2, **FREE)
    assert all((loss.means["ratio/mean"] != 1).all() for loss in later)
    logs = torch.stack([loss.means["ratio/mean"] for loss in later]).log()
    for loss in losses(policy, updates_per_step=2, estimate="sample", **FREE):
        assert torch.allclose(loss.means["ratio/mean"], logs.mean(0).exp())


def test_the_clip_takes_the_gradient_away_on_one_side_only():
    """All ratios are above 1.01: good samples say nothing more, bad ones go back."""
    policy = tilted(0.0)
    sample = data(policy, 0, rows=50)
    with torch.no_grad():
        weight(policy)[0, :, 0] = -0.5
    algorithm = Algorithm(Config(updates_per_step=2, clip_range=1e-9, **FREE))
    (first, *_) = algorithm.losses(policy, sample, torch.ones(50).double(), Noise(0))
    outside = first.means["ratio/mean"] > 1
    assert 5 < outside.sum() < 45
    first.rows.sum().backward()
    expected = policy.parameters[WEIGHT].grad
    assert expected is not None
    inside = Algorithm(Config(updates_per_step=2, clip_range=1e9, **FREE))
    policy.parameters[WEIGHT].grad = None
    (free, *_) = inside.losses(policy, sample, (~outside).double(), Noise(0))
    free.rows.sum().backward()
    assert torch.allclose(policy.parameters[WEIGHT].grad, expected)  # pyright: ignore[reportArgumentType]


def test_one_ratio_a_sample_has_the_gradient_of_one_a_time_while_both_are_one():
    policy = moved(tilted(0.0))
    sample, advantages = data(policy, 0), torch.randn(400).double()
    by_time, by_sample = (
        gradient(Algorithm(Config(estimate=estimate, **FREE)), policy, sample, advantages)
        for estimate in ("time", "sample")
    )
    assert torch.allclose(by_time, by_sample)


def test_both_anchors_pull():
    policy = tilted(0.0)
    with torch.no_grad():
        weight(policy)[:, :, -1] += 0.1
    policy.keep("teacher")
    with torch.no_grad():
        weight(policy)[:, :, -1] += 0.2
    for loss in losses(policy, kl_weight=2.0, teacher_weight=3.0, **GRID):
        assert loss.means["kl"].tolist() == pytest.approx([0.09] * 4)
        assert loss.means["teacher"].tolist() == pytest.approx([0.04] * 4)
        penalty = 3 * loss.rows - loss.means["policy_loss"]
        assert penalty.tolist() == pytest.approx([2 * 0.09 + 3 * 0.04] * 4)


def test_what_a_sample_is_held_to_the_reference_for_is_not_the_teachers():
    """Gates and groups that go free are for the reference; without its teacher AWM diverges."""
    policy = moved(tilted(0.0))
    sample, advantages = data(policy, 0, rows=4), torch.zeros(4).double()
    settings = {"kl_weight": 2.0, "teacher_weight": 3.0, **GRID}
    held = torch.tensor([0.0, 0.0, 4.0, 0.0]).double()
    every = Algorithm(Config(**settings)).losses(policy, sample, advantages, Noise(0))
    some = Algorithm(Config(**settings)).losses(policy, replace(sample, held=held), advantages, Noise(0))
    for one, two in zip(every, some, strict=True):
        assert (one.means["teacher"] > 0).all() and torch.equal(one.means["teacher"], two.means["teacher"])
        assert torch.equal(two.means["kl"], held * one.means["kl"])


def test_the_teacher_follows_and_the_start_is_taken_anew():
    policy = tilted(0.0)
    with torch.no_grad():
        weight(policy)[:] = 1.0
    algorithm = Algorithm(Config(updates_per_step=2, teacher_decay=Ramp(rate=0.1, max=0.25)))
    assert algorithm.after_step(policy, updates=3) == {"teacher_decay": 0.25}
    assert (policy.copies["teacher"][WEIGHT] == 0.75).all()
    assert (policy.copies["start"][WEIGHT] == 1).all()


def test_published_decay_of_the_teacher():
    assert [Config().teacher_decay.at(n) for n in (0, 10, 100, 300, 900)] == pytest.approx([0, 0.01, 0.1, 0.3, 0.3])


@pytest.mark.parametrize(
    ("config", "copies", "expected"),
    [
        (FREE, (), 3),
        ({**FREE, "kl_weight": 1.0}, (), 6),
        ({**FREE, "teacher_weight": 1.0}, ("teacher",), 6),
        ({**FREE, "updates_per_step": 2}, ("start",), 6),
        ({**GRID, "updates_per_step": 2}, ("start", "teacher"), 12),
    ],
)
def test_other_weights_cost_a_pass_only_where_they_count(
    config: dict[str, Any], copies: tuple[str, ...], expected: int, monkeypatch: pytest.MonkeyPatch
):
    algorithm = Algorithm(Config(**config))
    assert algorithm.needs.copies == copies
    assert passes(tilted(0.0), algorithm, monkeypatch) == expected
