"""RVM: signed weights on the velocity's error. Where it rests and its relatives are in test_forward.py."""

import pytest
import torch

from rlalign.algorithms.rvm import Algorithm, Config
from rlalign.mdp.noise import Noise
from rlalign.types import RewardScores, Scores

from .gaussians import GRID, data, gradient, moved, passes, tilted


def test_advantages_are_scaled_after_the_clamp():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 40.0]])
    scores = Scores({"r": RewardScores(rewards, torch.ones(2, 2, dtype=torch.bool), "train", 1.0)})
    computed = Algorithm(Config(advantage="center")).advantages(scores)
    assert computed.flatten().tolist() == pytest.approx([-0.05, 0.05, -0.5, 0.5])


def test_the_loss_is_the_weighted_error_of_the_velocity():
    policy = moved(tilted(0.0))
    sample, advantages = data(policy, 0, rows=8), torch.linspace(-1, 1, 8).double()
    for loss in Algorithm(Config(kl_weight=0.5, weighting="t", **GRID)).losses(policy, sample, advantages, Noise(0)):
        assert torch.allclose(loss.means["policy_loss"], advantages * loss.means["error"])
        assert torch.allclose(3 * loss.rows, loss.means["policy_loss"] + 0.5 * loss.means["kl"])


def test_one_step_follows_the_exponential_path():
    """For r = a x0 on N(0, 1) data: -gradient of the constants = 2/T a t / ((1-t)² + t²) du, u falling with x0."""
    policy = tilted(0.0)
    t = policy.schedule(policy.settings).sigma[:-1].double()
    gradients = torch.stack(
        [
            gradient(Algorithm(Config(**GRID)), policy, sample, 0.5 * sample.final.flatten())
            for sample in (data(policy, batch) for batch in range(30))
        ]
    )[:, 0, :, -1]
    truth = 2 / 3 * 0.5 * t / (t.square() + (1 - t).square())
    error = gradients.std(0) / 30**0.5
    assert float(((gradients.mean(0) - truth).abs() / error).max()) < 3
    assert float(((gradients.mean(0) + truth).abs() / error).max()) > 6


@pytest.mark.parametrize(("kl_weight", "expected"), [(0.0, 3), (0.1, 6)])
def test_passes(kl_weight: float, expected: int, monkeypatch: pytest.MonkeyPatch):
    algorithm = Algorithm(Config(kl_weight=kl_weight, **GRID))
    assert algorithm.needs.silent_zero
    assert passes(tilted(0.0), algorithm, monkeypatch) == expected
