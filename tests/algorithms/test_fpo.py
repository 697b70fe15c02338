"""FPO: one ratio a sample, from the same pairs of time and noise in all updates of a step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms.forward import at_times, distance, likelihood, mean_over_times, velocities
from rlalign.algorithms.fpo import Algorithm, Config
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy

from .chains import WEIGHT, weight
from .gaussians import data, gradient, moved, passes, tilted


def ratios(policy: Policy, **config: Any) -> Tensor:
    """[b, number of losses]."""
    sample = data(policy, 0, rows=300)
    algorithm = Algorithm(Config(**config))
    losses = list(algorithm.losses(policy, sample, torch.ones(300).double(), Noise(0)))
    return torch.stack([loss.means["ratio/mean"] for loss in losses], 1)


def test_the_ratio_is_of_the_mean_over_the_pairs():
    policy = moved(tilted(0.0))
    by_pair, whole = ratios(policy, estimate="time", num_times=4), ratios(policy, num_times=4)
    assert torch.allclose(whole, by_pair.log().mean(1, keepdim=True).exp().expand(300, 4))


def test_the_gradient_is_that_of_all_pairs_at_once():
    """-clipped A ρ, ρ = exp(mean of all ℓ_θ - ℓ_old) with the graphs of all pairs; the penalty with it."""
    config = Config(num_times=4, kl_weight=0.3, kl_weighting="t")
    policy = moved(tilted(0.2))
    sample, advantages = data(policy, 0, rows=300), torch.linspace(-2, 2, 300).double()
    ours = gradient(Algorithm(config), policy, sample, advantages)
    gains, penalties = list[Tensor](), list[Tensor]()
    for at in at_times(config, sample, Noise(0)):
        v, fixed = velocities(policy, sample, at, ["start", "reference"])
        gains.append(likelihood(v, at, "uniform") - likelihood(fixed["start"], at, "uniform"))
        penalties.append(distance(v, fixed["reference"], at, "t"))
    rho = mean_over_times(gains).exp()
    clipped = torch.maximum(-advantages * rho, -advantages * rho.clamp(0.95, 1.05))
    (clipped + 0.3 * mean_over_times(penalties)).mean().backward()
    truth = policy.parameters[WEIGHT].grad
    assert truth is not None
    assert torch.allclose(ours, truth.view_as(ours))


def test_few_pairs_make_the_ratio_too_large():
    """Jensen: E exp(mean of T) falls with T to the exponential of the expectation."""
    policy = moved(tilted(0.0), size=0.2)
    means = [float(ratios(policy, num_times=number).mean()) for number in (1, 4, 32)]
    assert means[0] > means[1] > means[2]


def test_a_sample_keeps_its_pairs_through_all_updates():
    policy = tilted(0.0)
    assert (ratios(policy) == 1).all()  # at the weights that the step began with: equal noise, equal losses
    assert torch.equal(ratios(moved(policy)), ratios(policy))


def test_the_clip_stops_what_is_already_likelier():
    policy = moved(tilted(0.0))
    sample, algorithm = data(policy, 0, rows=300), Algorithm(Config(clip_range=1e-6))
    (loss, *_) = algorithm.losses(policy, sample, torch.ones(300).double(), Noise(0))
    rho = loss.means["ratio/mean"]
    assert loss.means["clip_fraction_high"].sum() > 10
    loss.rows.sum().backward()
    clipped = policy.parameters[WEIGHT].grad
    policy.parameters[WEIGHT].grad = None
    (loss, *_) = Algorithm(Config(clip_range=1e9)).losses(policy, sample, (rho < 1).double(), Noise(0))
    loss.rows.sum().backward()
    assert clipped is not None
    assert torch.allclose(clipped, policy.parameters[WEIGHT].grad)  # pyright: ignore[reportArgumentType]


def test_the_start_is_taken_anew():
    policy = moved(tilted(0.0))
    assert Algorithm(Config()).after_step(policy, updates=2) == {}
    assert torch.equal(policy.copies["start"][WEIGHT].view_as(weight(policy)), weight(policy))


@pytest.mark.parametrize(
    ("config", "expected"),
    [({}, 24), ({"estimate": "time"}, 16), ({"updates_per_step": 1}, 16), ({"kl_weight": 1.0}, 32)],
)
def test_passes(config: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch):
    assert passes(tilted(0.0), Algorithm(Config(**config)), monkeypatch) == expected
