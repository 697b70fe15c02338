"""RAM: the target and what moves it. Where it rests and its relatives are in test_forward.py."""

from typing import Any

import pytest
import torch

from rlalign.algorithms.ram import Algorithm, Config, target
from rlalign.mdp.noise import Noise

from .chains import WEIGHT
from .gaussians import GRID, data, gradient, in_errors, moved, passes, tilted


def test_the_target_by_hand():
    v_ref, v_baseline, u = (torch.tensor([[a, a], [a, a]]) for a in (1.0, 2.0, 5.0))
    assert target(v_ref, v_baseline, u, torch.tensor([1.0, -2.0]), 0.5).tolist() == [[2.5, 2.5], [-2.0, -2.0]]


def test_the_baseline_is_lagged_or_the_policy_itself():
    policy = moved(tilted(0.5))  # reference, old and policy differ
    sample, advantages = data(policy, 0, rows=50), torch.linspace(-2, 2, 50).double()
    by_name = {
        name: gradient(Algorithm(Config(baseline=name, **GRID)), policy, sample, advantages)
        for name in ("old", "policy")
    }
    assert not torch.allclose(by_name["old"], by_name["policy"], rtol=1e-3)
    policy.blend("old", 0.0)
    assert torch.allclose(
        gradient(Algorithm(Config(baseline="old", **GRID)), policy, sample, advantages), by_name["policy"]
    )


def test_without_reward_it_is_pulled_back_to_the_reference():
    policy = moved(tilted(0.0))
    for loss in Algorithm(Config(kl_weight=0.5, **GRID)).losses(
        policy, data(policy, 0, rows=8), torch.zeros(8).double(), Noise(0)
    ):
        assert torch.allclose(loss.means["policy_loss"], loss.means["moved"])
        assert torch.allclose(loss.means["kl"], loss.means["moved"])
        assert torch.allclose(3 * loss.rows, 1.5 * loss.means["moved"])


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2"])
def test_time_weights_do_not_move_where_it_rests(weighting: Any):
    """On samples of the old weights: v_ref + κ Cov(a x0, u | x_t), one step along the exponential path."""
    policy = tilted(0.4)
    policy.load("old", policy.weights("reference"))
    algorithm = Algorithm(Config(kappa=0.5, weighting=weighting, **GRID))
    assert in_errors(algorithm, policy, lambda x0: 0.8 * x0) < 3
    assert in_errors(algorithm, policy, lambda x0: 1.2 * x0, batches=15) > 6


@pytest.mark.parametrize(
    ("baseline", "copies", "sampled", "expected"), [("old", ("old",), "old", 9), ("policy", (), "policy", 6)]
)
def test_the_policy_as_its_own_baseline_saves_a_pass(
    baseline: Any, copies: tuple[str, ...], sampled: str, expected: int, monkeypatch: pytest.MonkeyPatch
):
    algorithm = Algorithm(Config(baseline=baseline, **GRID))
    assert (algorithm.needs.copies, algorithm.sample_with) == (copies, sampled)
    assert passes(tilted(0.0), algorithm, monkeypatch) == expected


def test_the_old_weights_follow():
    policy = moved(tilted(0.0))
    assert Algorithm(Config()).after_step(policy, updates=100) == {"old_decay": 0.1}
    assert torch.allclose(policy.copies["old"][WEIGHT], 0.9 * policy.parameters[WEIGHT])
    assert Algorithm(Config(baseline="policy")).after_step(policy, updates=100) == {}
