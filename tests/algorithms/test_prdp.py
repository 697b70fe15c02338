"""PRDP: its loss by hand, and T7 of the exact ladder: at the optimum log-ratios predict rewards, and only there."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms.prdp import Algorithm, Config, mean_over_pairs, pair_errors, proximal
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory

from .chains import WEIGHT, make_policy, weight
from .preferences import at_the_optimum, gradient, regression, reward, sample_groups, scores_of, sum_of_rows

BETA, SIZE = 0.7, 4
WIDE: dict[str, Any] = {"beta": BETA, "clip_range": 1e9}


def centred(batch: Trajectory) -> Tensor:
    return Algorithm(Config()).advantages(scores_of(reward(batch.final).view(-1, SIZE))).flatten().double()


def losses(policy: Policy, batch: Trajectory, **config: Any):
    return list(Algorithm(Config(**{**WIDE, **config})).losses(policy, batch, centred(batch), Noise(0)))


# --- by hand


def test_a_row_carries_the_mean_over_its_pairs():
    group, implicit = torch.tensor([0, 0, 0, 1]), torch.tensor([1.0, 2.0, 4.0, 9.0])
    errors = pair_errors(implicit, torch.tensor([0.0, 3.0, 3.0, 0.0]))  # missed: 1, -1, 1, 9
    assert mean_over_pairs(errors, group).tolist() == [(4 + 0) / 2, (4 + 4) / 2, (0 + 4) / 2, 0]


def test_a_step_is_held_within_the_bound_of_the_sampler():
    rho = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    held = proximal(rho, torch.tensor([0.05, 0.3, -0.3]), 0.1)  # ρ_old = 0.95, 0.7, 1.3
    assert held.tolist() == pytest.approx([1.0, 0.8, 1.2])
    (slope,) = torch.autograd.grad(held.sum(), rho)
    assert slope.tolist() == [1, 0, 0]


def test_advantages_are_centred_rewards():
    rewards = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])
    assert Algorithm(Config()).advantages(scores_of(rewards)).tolist() == [[-1, 1, 0], [0, 0, 0]]


def test_at_the_reference_the_loss_is_the_spread_of_the_rewards():
    policy = make_policy(dim=2)
    batch = sample_groups(policy, 50, SIZE, seed=0)
    for loss in losses(policy, batch):
        spread = 2 * reward(batch.final).view(-1, SIZE).var(1)  # the mean over pairs of (r_i - r_j)²
        assert torch.allclose(loss.means["policy_loss"].view(-1, SIZE).mean(1), spread / BETA**2, rtol=1e-5)
        assert torch.allclose(loss.means["reward_error"], BETA**2 * loss.means["policy_loss"])
        assert (loss.means["ratio/mean"] == 1).all() and (loss.maxima["ratio/max_abs_dev"] == 0).all()


@pytest.mark.parametrize("beta", [0.7, 2.0])
def test_the_runs_reduction_does_not_matter(beta: float):
    found: list[Tensor] = []
    for reduction in ("sum", "mean"):
        policy = at_the_optimum(BETA, logprob_reduction=reduction)
        with torch.no_grad():
            weight(policy)[:, 0, -1] += 0.1
        batch = sample_groups(policy, 10, SIZE, seed=0)
        with torch.no_grad():
            weight(policy)[:, 0, -1] += 0.3  # a second update
        scale = 2 if reduction == "mean" else 1
        found.append(gradient(policy, losses(policy, batch, beta=beta, clip_range=0.1 / scale)))
    assert torch.allclose(found[0], found[1], rtol=1e-9)


def test_the_bound_stops_what_would_go_on_and_lets_back():
    """One pair, of which the second update is beyond the bound on the side that the rewards ask for."""
    policy = make_policy(dim=2)
    batch = sample_groups(policy, 1, 2, seed=0)
    far = torch.tensor([1e3, -1e3], dtype=torch.float64)
    algorithm = Algorithm(Config(beta=1.0, clip_range=1e-3))
    onwards = -gradient(policy, algorithm.losses(policy, batch, far, Noise(0)))
    assert onwards.norm() > 0
    with torch.no_grad():
        policy.parameters[WEIGHT].add_(0.1 * onwards / onwards.norm())
    assert (gradient(policy, algorithm.losses(policy, batch, far, Noise(0))) == 0).all()
    assert (gradient(policy, algorithm.losses(policy, batch, -far, Noise(0))) != 0).any()
    assert all((loss.means["clip_fraction"] > 0).all() for loss in algorithm.losses(policy, batch, far, Noise(0)))


# --- T7


def implicit(policy: Policy, batch: Trajectory) -> Tensor:
    """β Σ_k log π_θ/π_ref, measured with Gaussian.log_prob."""

    def total() -> Tensor:
        steps = [policy.replay(batch, slot).gaussian for slot in range(batch.num_kept)]
        return torch.stack([g.log_prob(batch.x_next[:, k], "sum") for k, g in enumerate(steps)]).sum(0)

    with torch.no_grad():
        own = total()
        with policy.using("reference"):
            return BETA * (own - total())


def fit(policy: Policy, shared: bool) -> tuple[float, float]:
    """Slope and R² of implicit on real reward differences, of neighbours in 1000 pairs."""
    batch = sample_groups(policy, 1000, 2, seed=3, shared=shared)
    difference = [values.view(-1, 2).diff(dim=1).flatten() for values in (reward(batch.final), implicit(policy, batch))]
    return regression(*difference)


@pytest.mark.parametrize("kernel", ["flow_sde", "cps", "dance_sde"])
def test_at_the_optimum_differences_of_rewards_are_predicted(kernel: str):
    slope, explained = fit(at_the_optimum(BETA, kernel=kernel), shared=True)
    assert slope == pytest.approx(1, abs=1e-6)
    assert explained > 0.999999


def test_not_with_starts_of_their_own_nor_for_another_beta():
    assert fit(at_the_optimum(BETA, noise_level=0.3), shared=True)[1] > 0.999999
    assert fit(at_the_optimum(BETA, noise_level=0.3), shared=False)[1] < 0.9
    assert fit(at_the_optimum(1.2 * BETA), shared=True)[0] == pytest.approx(1 / 1.2, abs=1e-6)
    assert fit(make_policy(dim=2), shared=True)[0] == 0


def test_nothing_is_left_at_the_optimum():
    policy = at_the_optimum(BETA)
    batch = sample_groups(policy, 100, SIZE, seed=0)
    found = losses(policy, batch)
    assert sum_of_rows(found).item() == pytest.approx(0, abs=1e-9)
    assert gradient(policy, found).abs().max() < 1e-5
    assert gradient(policy, losses(policy, batch, beta=1.1 * BETA)).abs().max() > 1e-2


def test_with_starts_of_their_own_the_gradient_still_rests_there():
    """The start's share of the reward is an error that no step can explain, and that none is blamed for on average."""
    policy = at_the_optimum(BETA)

    def off_by(policy: Policy, beta: float) -> float:
        batches = [sample_groups(policy, 50, SIZE, seed, shared=False) for seed in range(60)]
        found = torch.stack([gradient(policy, losses(policy, batch, beta=beta)) for batch in batches])
        found = found.view(60, 2, 3, 3)[:, :, :2]
        return float((found.mean(0).abs() / (found.std(0) / 60**0.5)).max())

    assert off_by(policy, BETA) < 4
    assert off_by(policy, 1.1 * BETA) > 6


def test_training_on_the_references_samples_finds_the_optimum():
    """Regression: 60 groups of the reference are enough to know u_k exactly, since the fit is perfect."""
    policy, target = make_policy(dim=2), weight(at_the_optimum(BETA)).clone()
    batch = sample_groups(policy, 60, SIZE, seed=0)
    optimizer = torch.optim.LBFGS([policy.parameters[WEIGHT]], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> float:
        found = losses(policy, batch)
        policy.parameters[WEIGHT].grad = gradient(policy, found)
        return sum_of_rows(found).item() / len(batch.final)

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(weight(policy)[:, :2], target[:, :2], atol=1e-3)
