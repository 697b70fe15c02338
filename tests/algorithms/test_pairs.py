"""Which samples make a pair, losses of a margin, log-ratios, and the loss of a whole trajectory a step at a time."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlalign.algorithms.base import Loss
from rlalign.algorithms.losses import fixed_step
from rlalign.algorithms.pairs import (
    Pairs,
    PairSettings,
    log_ratio,
    margin_metrics,
    marks,
    marks_of,
    pair_loss,
    whole_trajectory,
)
from rlalign.mdp.transition import Gaussian
from rlalign.policy import Policy
from rlalign.types import Scores, Trajectory

from .chains import make_policy, weight
from .preferences import gradient, sample_groups, scores_of

VALUES = torch.tensor([[3.0, 1.0, 4.0, 1.5, 9.0], [2.0, 2.0, 2.0, 2.0, 2.0], [5.0, 5.0, 1.0, 1.0, 3.0]])
ALL = torch.ones_like(VALUES, dtype=torch.bool)


def test_the_best_is_paired_with_the_worst_and_ties_with_nobody():
    expected = [[0, -1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, -1, 0]]
    assert marks(VALUES, ALL, "best_worst").tolist() == expected


def test_ranked_pairs_go_on_inwards():
    expected = [[0, -1, 2, -2, 1], [0, 0, 0, 0, 0], [1, 2, -2, -1, 0]]
    assert marks(VALUES, ALL, "ranked").tolist() == expected
    even = torch.tensor([[1.0, 2.0, 2.0, 3.0]])  # the inner pair ties
    assert marks(even, torch.ones(1, 4, dtype=torch.bool), "ranked").tolist() == [[-1, 0, 0, 1]]


def test_invalid_samples_are_never_in_a_pair():
    valid = torch.tensor([[True, True, True, True, False], [False] * 5, [False, True, False, False, False]])
    assert marks(VALUES, valid, "best_worst").tolist() == [[0, -1, 1, 0, 0], [0] * 5, [0] * 5]
    assert marks(VALUES, valid, "ranked").tolist() == [[2, -1, 1, -2, 0], [0] * 5, [0] * 5]


def marked(scores: Scores, settings: PairSettings) -> list[list[float]]:
    return marks_of(scores, settings).tolist()


def test_only_unanimous_pairs():
    other = torch.tensor([[0.0, 0.2, 0.1, 0.05, 0.1]])  # says that the worst beats the best
    scores = scores_of(VALUES[:1], other)
    assert marked(scores, PairSettings(pairs="ranked")) == [[0, -1, 2, -2, 1]]
    assert marked(scores, PairSettings(pairs="ranked", unanimous=True)) == [[0, 0, 2, -2, 0]]


def test_samples_that_are_not_selected_make_no_pairs():
    one, two = torch.tensor([[3.0, 0.0, 1.0, 0.5]]), torch.tensor([[0.0, 2.0, 0.5, 0.25]])  # the last is dominated
    scores = scores_of(one, two)
    assert marked(scores, PairSettings(pairs="best_worst")) == [[1, 0, 0, -1]]
    assert marked(scores, PairSettings(select="pareto")) == [[1, 0, -1, 0]]


GROUP = torch.tensor([0, 0, 0, 1, 1, 2, 2])
MARKS = torch.tensor([1.0, 0.0, -1.0, -2.0, 2.0, 1.0, 2.0])  # the last two have no counterpart


def test_partners_are_found_by_group_and_mark():
    pairs = Pairs.of(GROUP, MARKS)
    assert pairs.partner.tolist() == [2, 1, 0, 4, 3, 5, 6]
    assert pairs.sign.tolist() == [1, 0, -1, -1, 1, 0, 0]
    implicit = torch.tensor([5.0, 7.0, 1.0, 2.0, 1.5, 8.0, 9.0])
    assert pairs.margin(implicit).tolist() == [4, 0, 4, -0.5, -0.5, 0, 0]
    assert pairs.winner(implicit).tolist() == [5, 0, 5, 1.5, 1.5, 0, 0]
    assert pairs.loser(implicit).tolist() == [1, 0, 1, 2, 2, 0, 0]
    metrics = margin_metrics(pairs, pairs.margin(implicit), implicit)
    assert metrics["accuracy"].tolist() == [1, 0, 1, 0, 0, 0, 0]


def test_a_pairs_loss_pushes_its_members_apart_and_nobody_else():
    implicit = torch.tensor([5.0, 7.0, 1.0, 2.0, 1.5, 8.0, 9.0], requires_grad=True)
    pairs = Pairs.of(GROUP, MARKS)
    rows = pair_loss(pairs.margin(implicit), "sigmoid", 1.0) * pairs.inside
    (slope,) = torch.autograd.grad(rows.sum(), implicit)
    one, two = 2 / (1 + math.exp(4.0)), 2 / (1 + math.exp(-0.5))  # both members carry the loss
    assert slope.tolist() == pytest.approx([-one, 0, one, two, -two, 0, 0])
    assert rows[[1, 5, 6]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("h", [-3.0, 0.0, 0.4, 2.5])
def test_losses_of_a_margin(h: float):
    margin, sigma = torch.tensor([h], dtype=torch.float64), 1 / (1 + math.exp(-h))
    expected: dict[Any, float] = {
        "sigmoid": -math.log(sigma),
        "cdpo": -0.8 * math.log(sigma) - 0.2 * math.log(1 - sigma),
        "hinge": max(0.0, 1 - h),
        "ipo": (h / 4 - 1 / 8) ** 2,
    }
    for form, value in expected.items():
        assert pair_loss(margin, form, beta=4.0, label_smoothing=0.2).item() == pytest.approx(value)


def test_label_smoothing_has_its_minimum_where_the_labels_are_right_so_often():
    h = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(pair_loss(h, "cdpo", 1.0, 0.1), h)
    assert slope.item() == pytest.approx(0, abs=1e-12)


# --- log-ratios


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_log_ratio_is_that_of_the_densities(reduction: Any):
    generator = torch.Generator().manual_seed(0)
    x, mean, other = (torch.randn(5, 3, 2, generator=generator, dtype=torch.float64) for _ in range(3))
    std = torch.rand(5, 1, 1, generator=generator, dtype=torch.float64) + 0.1
    one, two = Gaussian(mean, std), Gaussian(other, std)
    expected = one.log_prob(x, reduction) - two.log_prob(x, reduction)
    assert torch.allclose(log_ratio(one, two, x, reduction), expected, rtol=1e-12)


def test_the_log_ratio_keeps_the_digits_that_log_probs_lose():
    """65536 numbers in float32, means that differ by 1e-5: four digits of the ratio, none of the difference."""
    generator = torch.Generator().manual_seed(0)
    mean, step = torch.randn(1, 65536, generator=generator), 1e-5 * torch.randn(1, 65536, generator=generator)
    x, std = mean + torch.randn(1, 65536, generator=generator), torch.ones(1, 1)
    wide = [tensor.double() for tensor in (mean + step, mean, std)]
    truth = log_ratio(Gaussian(wide[0], wide[2]), Gaussian(wide[1], wide[2]), x.double(), "sum").item()
    one, two = Gaussian(mean + step, std), Gaussian(mean, std)
    assert log_ratio(one, two, x, "sum").item() == pytest.approx(truth, rel=1e-4)
    assert abs((one.log_prob(x, "sum") - two.log_prob(x, "sum")).item() - truth) > 0.9 * abs(truth)
    assert log_ratio(one, one, x, "sum").item() == 0


# --- a loss of all steps, one graph at a time


def moved() -> Policy:
    """A policy away from its reference, in a direction of its own for every step."""
    policy = make_policy(dim=2, num_steps=4)
    with torch.no_grad():
        weight(policy).add_(0.2 * torch.sin(torch.arange(weight(policy).numel()).view_as(weight(policy))))
    return policy


def strange_loss(rho: Tensor, to_sampler: Tensor) -> Loss:
    """Nothing that a sum of terms of single steps could be."""
    total = rho.sum(1)
    rows = -logsigmoid(total * total.roll(1)) + (rho[:, 0] * rho[:, 1]).square() + to_sampler.sum(1)
    return Loss(rows, {"policy_loss": rows.detach()})


def all_at_once(policy: Policy, sample: Trajectory) -> Tensor:
    ratios: list[Tensor] = []
    for slot in range(sample.num_kept):
        reference = fixed_step(policy, "reference", sample, slot).gaussian
        ratios.append(log_ratio(policy.replay(sample, slot).gaussian, reference, sample.x_next[:, slot], "sum"))
    return strange_loss(torch.stack(ratios, 1), torch.zeros_like(sample.log_probs)).rows


def test_the_gradient_a_step_at_a_time_is_that_of_all_at_once():
    policy = moved()
    sample = sample_groups(policy, 3, 2, seed=0)
    expected = gradient(policy, [Loss(all_at_once(policy, sample))])
    losses = list(whole_trajectory(policy, sample, "sum", strange_loss))
    assert len(losses) == sample.num_kept
    assert torch.allclose(gradient(policy, losses), expected, rtol=1e-10, atol=1e-14)
    assert torch.allclose(torch.stack([loss.rows for loss in losses]).sum(0), all_at_once(policy, sample), rtol=1e-10)


def test_the_loss_is_told_how_far_the_policy_is_from_the_sampler():
    policy = moved()
    sample = sample_groups(policy, 3, 2, seed=0)
    seen: list[Tensor] = []

    def loss(rho: Tensor, to_sampler: Tensor) -> Loss:
        seen.append(to_sampler)
        return strange_loss(rho, to_sampler)

    list(whole_trajectory(policy, sample, "sum", loss))
    with torch.no_grad():
        weight(policy)[:, :, -1] += 0.1
    list(whole_trajectory(policy, sample, "sum", loss))
    assert (seen[0] == 0).all()
    assert (seen[1] != 0).all()
