"""DGPO: the group's preference, its weight, the clip."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlalign.algorithms.base import Loss
from rlalign.algorithms.dgpo import Algorithm, Config, group_weight
from rlalign.algorithms.forward import Noised, Ramp, at_times, error, group_index, velocities
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from tests import small

from .chains import WEIGHT, make_policy, weight
from .gaussians import GRID, data, gradient, moved, passes, tilted

GROUP = 4
FREE: dict[str, Any] = {"clip_range": None, "kl_weight": 0.0, **GRID}


@pytest.fixture
def advantages() -> Tensor:
    drawn = torch.randn(10, GROUP, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (drawn - drawn.mean(1, keepdim=True)).flatten()


def losses(policy: Policy, advantages: Tensor, **config: Any) -> list[Loss]:
    sample = data(policy, 0, rows=len(advantages), samples=GROUP)
    return list(Algorithm(Config(**config)).losses(policy, sample, advantages, Noise(0)))


def test_group_weights_by_hand():
    gained = torch.tensor([0.5, -0.5, 1.0, 1.0])
    weights = group_weight(gained, torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([0, 0, 2, 2]), beta=2.0)
    assert weights.tolist() == pytest.approx([torch.tensor(1.0).sigmoid().item()] * 2 + [0.5] * 2)


def test_the_gradient_is_that_of_the_groups_preference(advantages: Tensor):
    """-log σ(-S_g), averaged over groups and divided by β."""
    beta, policy = 3.0, moved(tilted(0.0))
    sample = data(policy, 0, rows=len(advantages), samples=GROUP)
    ours = gradient(Algorithm(Config(beta=beta, **FREE)), policy, sample, advantages)

    def preference(at: Noised) -> Tensor:
        v, fixed = velocities(policy, sample, at, ["reference"])
        gained = error(v, at, "uniform") - error(fixed["reference"], at, "uniform")
        return -logsigmoid(-beta * (advantages * gained).view(-1, GROUP).mean(1)).mean() / beta

    times = at_times(Config(**FREE), sample, Noise(0), by_group=True)
    torch.stack([preference(at) for at in times]).mean().backward()
    truth = policy.parameters[WEIGHT].grad
    assert truth is not None
    assert torch.allclose(ours, truth.view_as(ours))


def test_the_policy_samples_until_the_old_weights_take_over():
    """θ_old lags from the first step on, and the clip is against it throughout; what samples turns to it at step 3."""
    chosen = Algorithm(Config(rollouts="old", old_after=3, old_decay=Ramp(start=0.5, max=0.5)))
    assert chosen.sample_with == "old" and chosen.config.others == ["teacher", "reference"]
    sampler, learner = small.workers(chosen)
    policy = learner.policy
    lagged = {key: tensor.clone() for key, tensor in policy.weights("policy").items()}
    for step in range(5):
        trajectories = small.sample(sampler, step)
        metrics = learner.update(trajectories, chosen.advantages(small.scored(trajectories)), step)
        lagged = {key: 0.5 * old + 0.5 * policy.weights("policy")[key] for key, old in lagged.items()}
        for key, tensor in policy.weights("old").items():
            torch.testing.assert_close(policy.weights("teacher")[key], lagged[key])
            assert torch.equal(tensor, policy.weights("teacher" if step >= 2 else "policy")[key])
        assert (metrics["ratio/mean"] == 1) is (step == 0)
    assert not torch.equal(policy.weights("old")[key], policy.weights("policy")[key])


def test_a_group_that_is_told_apart_counts_less(advantages: Tensor):
    """After a step down the loss the weight of the groups has fallen below one half, after one up it has risen."""
    policy = tilted(0.0)
    sample = data(policy, 0, rows=len(advantages), samples=GROUP)
    down = gradient(Algorithm(Config(**FREE)), policy, sample, advantages)
    for sign in (-1.0, 1.0):
        other = tilted(0.0)
        with torch.no_grad():
            weight(other).add_(sign * 0.05 * down)
        weights = torch.stack([loss.means["group_weight"] for loss in losses(other, advantages, **FREE)])
        assert bool(weights.mean() > 0.5) == (sign > 0)


def test_groups_keep_to_themselves(advantages: Tensor):
    """Another group's advantages change nothing, those of the own group do."""
    policy = moved(tilted(0.0))
    other = advantages.clone()
    other[:GROUP] *= -1
    for one, two in zip(losses(policy, advantages, **FREE), losses(policy, other, **FREE), strict=True):
        assert torch.equal(one.rows[GROUP:], two.rows[GROUP:])
        assert not torch.equal(one.means["group_weight"][:GROUP], two.means["group_weight"][:GROUP])


@pytest.mark.parametrize("clip_kl", [False, True])
def test_the_clip_is_against_the_old_weights(advantages: Tensor, clip_kl: bool):
    policy = moved(tilted(0.0))
    config: dict[str, Any] = {"clip_range": 1e-6, "kl_weight": 0.5, "clip_kl": clip_kl, **GRID}
    (first, *_) = losses(policy, advantages, **config)
    q = first.means["ratio/mean"]
    still = torch.where(advantages > 0, q > 1 + 1e-6, q < 1 - 1e-6)
    assert 5 < still.sum() < 35
    gradients = torch.autograd.grad(first.rows[still].sum(), policy.parameters[WEIGHT], allow_unused=True)[0]
    assert bool((gradients == 0).all()) == clip_kl
    (bare, *_) = losses(policy, advantages, **config | {"kl_weight": 0.0})
    assert (torch.autograd.grad(bare.rows[still].sum(), policy.parameters[WEIGHT])[0] == 0).all()


def test_errors_may_be_compared_with_the_old_weights(advantages: Tensor):
    policy = tilted(0.5)  # old is where the policy is, the reference is not
    for loss in losses(policy, advantages, **FREE | {"compare_with": "old"}):
        assert (loss.means["group_weight"] == 0.5).all()
    assert any((loss.means["group_weight"] != 0.5).any() for loss in losses(policy, advantages, **FREE))


def test_rows_left_out_shrink_the_group():
    policy = make_policy()
    sample = data(policy, 0, rows=8, samples=GROUP).take(torch.tensor([0, 1, 3, 4, 5, 6, 7]))
    index = group_index(sample)
    assert [int((index == i).sum()) for i in index.unique()] == [3, 4]


@pytest.mark.parametrize(
    ("config", "copies", "expected"),
    [
        ({}, ("old",), 9),
        (FREE, (), 6),
        ({**FREE, "compare_with": "old"}, ("old",), 6),
        ({**FREE, "rollouts": "old"}, ("old",), 6),
    ],
)
def test_other_weights_cost_a_pass_only_where_they_count(
    config: dict[str, Any], copies: tuple[str, ...], expected: int, monkeypatch: pytest.MonkeyPatch
):
    algorithm = Algorithm(Config(**GRID | config))
    assert algorithm.needs.copies == copies
    assert algorithm.sample_with == config.get("rollouts", "policy")
    assert passes(tilted(0.0), algorithm, monkeypatch) == expected


def test_the_old_weights_follow():
    policy = moved(tilted(0.0))
    assert Algorithm(Config()).after_step(policy, updates=100) == {"old_decay": 0.1}
    assert torch.allclose(policy.copies["old"][WEIGHT], 0.9 * policy.parameters[WEIGHT])
    assert Algorithm(Config(**FREE)).after_step(policy, updates=100) == {}
