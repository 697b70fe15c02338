"""RAFT: who is chosen, and the law of the best of n."""

import math

import pytest
import torch

from rlalign.algorithms.raft import Algorithm, Config, best
from rlalign.mdp.noise import Noise
from rlalign.types import RewardScores, Scores

from .gaussians import GRID, data, gradient, moved, tilted

REWARDS = torch.tensor([[0.1, 0.7, 0.3, 0.5], [0.9, 0.2, 0.9, 0.1], [0.4, 0.4, 0.4, 0.4]])
ALL = torch.ones_like(REWARDS, dtype=torch.bool)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (1, [[0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]),
        (2, [[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]]),
        (3, [[0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]),
        (9, [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]),
    ],
)
def test_the_best_are_chosen_ties_included_and_flat_groups_not(keep: int, expected: list[list[int]]):
    assert best(REWARDS, ALL, keep).int().tolist() == expected


def test_invalid_rewards_are_never_chosen():
    valid = torch.tensor([[True, False, True, True], [False, True, True, True], [True, False, False, False]])
    computed = best(torch.where(valid, REWARDS, 0), valid, 1)
    assert computed.int().tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert not (best(-REWARDS, valid, 9) & ~valid).any()


def test_only_the_chosen_are_learnt_from():
    policy = moved(tilted(0.0))
    sample, algorithm = data(policy, 0, rows=40), Algorithm(Config(**GRID))
    chosen = (torch.arange(40) % 4 == 0).double()
    alone = sample.take(chosen.nonzero().flatten())
    ours = gradient(algorithm, policy, sample, chosen)
    assert torch.allclose(ours, gradient(algorithm, policy, alone, torch.ones(10).double()) / 4)
    assert algorithm.needs.silent_zero


@pytest.mark.parametrize(("number", "mean"), [(4, 1.029375), (8, 1.423600), (16, 1.765991)])
def test_the_law_of_the_best_of_n(number: int, mean: float):
    """Of normal rewards: the mean of the largest, and KL = log n - (n - 1) / n from log(n F^(n-1))."""
    rewards = torch.randn(20_000, number, generator=torch.Generator().manual_seed(number))
    scores = Scores({"r": RewardScores(rewards, torch.ones_like(rewards, dtype=torch.bool), "train", 1.0)})
    chosen = rewards[Algorithm(Config()).advantages(scores) == 1].double()
    assert len(chosen) == 20_000
    assert abs(float(chosen.mean()) - mean) < 3 * float(chosen.std()) / 20_000**0.5
    log_ratio = math.log(number) + (number - 1) * torch.special.log_ndtr(chosen)
    expected = math.log(number) - (number - 1) / number
    assert abs(float(log_ratio.mean()) - expected) < 3 * float(log_ratio.std()) / 20_000**0.5


def test_fitting_the_best_raises_the_samples():
    """On N(0, 1) data with r = x0 the gradient pushes the velocity's constants down, towards larger x0."""
    policy, sample = tilted(0.0), data(tilted(0.0), 0, samples=4)
    groups = sample.final.flatten().view(-1, 4)
    chosen = best(groups, torch.ones_like(groups, dtype=torch.bool)).flatten().double()
    algorithm = Algorithm(Config(**GRID))
    assert (gradient(algorithm, policy, sample, chosen)[0, :, -1] > 0).all()
    for loss in algorithm.losses(policy, sample, chosen, Noise(0)):
        assert (loss.rows[chosen == 0] == 0).all()
