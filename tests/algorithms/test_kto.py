"""Diffusion-KTO: thumbs, the reference point, and that rewards rise."""

import math
from typing import Any

import pytest
import torch

from rlalign.algorithms.base import Loss
from rlalign.algorithms.kto import Algorithm, Config, kto_loss, mean_where, thumbs
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

from .chains import make_policy, weight
from .preferences import data_groups, gradient, rewards_while_training, rises, scores_of

A = torch.tensor([[6.0, -1.0, -2.0, -3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, -1.0, 9.0]])
VALID = torch.tensor([[True] * 4, [True] * 4, [True, True, True, False]])


def test_thumbs():
    assert thumbs(A, VALID, median=False).tolist() == [[1, -1, -1, -1], [0] * 4, [1, -1, -1, 0]]
    assert thumbs(A, VALID, median=True).tolist() == [[1, 1, -1, -1], [0] * 4, [1, -1, -1, 0]]


def test_selected_samples_alone_get_one():
    one, two = torch.tensor([[3.0, 0.0, 1.0, 0.5]]), torch.tensor([[0.0, 2.0, 0.5, 0.25]])  # the last is dominated
    assert Algorithm(Config(select="pareto")).advantages(scores_of(one, two)).tolist() == [[1, 1, -1, 0]]


def test_recorded_thumbs_stand_for_themselves():
    told = scores_of(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0]]))
    assert Algorithm(Config(liked="positive")).advantages(told).tolist() == [[1, 1, 1], [1, -1, -1]]
    assert Algorithm(Config()).advantages(told).tolist() == [[0, 0, 0], [1, -1, -1]]


def test_the_reference_point_is_the_groups_mean_gain_if_that_is_positive():
    group, sign = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    gain = torch.tensor([3.0, 1.0, 50.0, -4.0, 1.0], requires_grad=True)
    loss, z = kto_loss(gain, sign, group, beta=0.5)
    assert z.tolist() == [2, 2, 2, 0, 0]

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    assert loss.tolist() == pytest.approx([1 - sigma(0.5), 1 - sigma(0.5), 0, 1 - sigma(-2.0), 1 - sigma(-0.5)])
    (slope,) = torch.autograd.grad(loss.sum(), gain)  # z is a number: a row's slope is its own
    flat = [-0.5 * sigma(x) * (1 - sigma(x)) for x in (0.5, 0.5, 0.0, -2.0, -0.5)]
    assert slope.tolist() == pytest.approx([flat[0], -flat[1], 0, flat[3], -flat[4]])


def test_means_by_group():
    group, values = torch.tensor([0, 0, 1]), torch.tensor([1.0, 3.0, 5.0])
    assert mean_where(values, torch.tensor([True, True, False]), group).tolist() == [2, 2, 0]


@pytest.fixture
def policy() -> Policy:
    policy = make_policy(dim=2, num_steps=4)
    with torch.no_grad():
        weight(policy)[:, :, -1] += 0.3
    return policy


@pytest.fixture
def batch(policy: Policy) -> Trajectory:
    return data_groups(policy, 2, 3, seed=0)


SIGNS = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, -1.0], dtype=torch.float64)


def losses(policy: Policy, batch: Trajectory, **config: Any) -> list[Loss]:
    return list(Algorithm(Config(**config)).losses(policy, batch, SIGNS, Noise(0)))


def test_at_the_reference_every_row_loses_a_half(batch: Trajectory):
    for loss in losses(make_policy(dim=2, num_steps=4), batch):
        assert loss.means["policy_loss"].tolist() == [0.5, 0.5, 0, 0.5, 0.5, 0.5]
        assert (loss.means["z_ref"] == 0).all()


def test_each_kind_has_its_weight(policy: Policy, batch: Trajectory):
    plain, weighted = losses(policy, batch), losses(policy, batch, liked_weight=3.0, disliked_weight=0.5)
    for one, two in zip(plain, weighted, strict=True):
        assert torch.allclose(two.rows, one.rows * torch.where(SIGNS > 0, 3.0, 0.5))


def test_beta_goes_by_the_number_of_latent_elements_unless_it_is_given(policy: Policy, batch: Trajectory):
    one, two = losses(policy, batch), losses(policy, batch, beta=2 / 16)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(one, two, strict=True))


def test_the_gains_are_logged_by_kind(policy: Policy, batch: Trajectory):
    for loss in losses(policy, batch, beta=1.0):
        liked, disliked = loss.means["liked_gain"], loss.means["disliked_gain"]
        share = torch.tensor([1 / 2] * 3 + [1 / 3] * 3)
        assert torch.allclose(loss.means["z_ref"], (share * liked + (1 - share) * disliked).clamp(min=0))


@pytest.mark.parametrize("config", [{}, {"liked": "above_median"}, {"times": "uniform"}], ids=str)
def test_rewards_rise_with_every_step_and_fall_with_flipped_thumbs(config: dict[str, Any]):
    def seen(sign: float) -> list[float]:
        policy = make_policy(dim=2)
        algorithm = Algorithm(Config(**{"num_times": 3, **config}))
        return rewards_while_training(
            policy, algorithm, lambda step: data_groups(policy, 60, 6, step), 6, sign, lr=0.05
        )

    assert rises(seen(1.0))
    assert rises([-value for value in seen(-1.0)])


def test_thumbs_at_random_lead_nowhere():
    """The twin of monotonicity: the same samples, their thumbs dealt anew."""
    policy = make_policy(dim=2)
    batch = data_groups(policy, 200, 6, 0)
    generator = torch.Generator().manual_seed(0)
    rewards = batch.final.flatten(1)[:, 0].view(-1, 6)
    told = Algorithm(Config()).advantages(scores_of(rewards)).flatten().double()
    dealt = told[torch.randperm(len(told), generator=generator)]
    algorithm = Algorithm(Config(num_times=3))
    one, two = (gradient(policy, algorithm.losses(policy, batch, signs, Noise(0))).norm() for signs in (told, dealt))
    assert one > 5 * two
