"""T7: at rest the log-ratios of a chain are its rewards: differences of a pair regress on Δr with slope 1 (5.10).

    β Σ_k log π_θ/π_ref (y_{k+1} | y_k) = r(y_N) + what the start decides          u_k = (c_k² / β) G_{k+1}ᵀ q

so R² = 1 for two samples from one y_0, and less for samples with starts of their own. PRDP and D3PO by trajectory are
trained from the base model and looked at on fresh pairs. D3PO by step, Diffusion-DPO and KTO fit each step or sample by
itself, so their implicit rewards only have to rise with the real ones.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import d3po, dpo, kto, prdp
from rlalign.algorithms.base import Algorithm, Loss
from rlalign.algorithms.forward import Noised, at_times, error, fixed_velocity, velocity
from rlalign.algorithms.losses import fixed_step
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Trajectory
from tests.algorithms.chains import WEIGHT, make_policy, weight
from tests.algorithms.preferences import (
    at_the_optimum,
    by_fifths,
    data_groups,
    gradient,
    regression,
    reward,
    rewards_while_training,
    rises,
    sample_groups,
    scores_of,
    sum_of_rows,
)

from .conftest import Proof

BETA = 0.7
SHARP = 3.0  # rewards that differ more, so that one step is far from having decided
WIDE = prdp.Config(beta=BETA, clip_range=1e9)
UNBOUND: dict[str, Any] = {"beta": BETA, "clip_range": None, "level": "trajectory"}


def implicit(policy: Policy, batch: Trajectory) -> Tensor:
    """Σ_k log π_θ/π_ref [b], measured with Gaussian.log_prob."""

    def total() -> Tensor:
        steps = [policy.replay(batch, slot).gaussian for slot in range(batch.num_kept)]
        return torch.stack([g.log_prob(batch.x_next[:, k], "sum") for k, g in enumerate(steps)]).sum(0)

    with torch.no_grad():
        own = total()
        with policy.using("reference"):
            return own - total()


def fit(policy: Policy, shared: bool, scale: float = 1.0, seed: int = 0) -> tuple[float, float]:
    """Slope and R² of β log-ratios on scale · r, differences of neighbours in 1000 fresh pairs of the policy."""
    batch = sample_groups(policy, 1000, 2, seed=seed + 333, shared=shared)
    values = scale * reward(batch.final), BETA * implicit(policy, batch)
    real, found = (value.view(-1, 2).diff(dim=1).flatten() for value in values)
    return regression(real, found)


def descended(policy: Policy, algorithm: Algorithm, batch: Trajectory, parts: list[tuple[Tensor, Tensor]]) -> Policy:
    """Down to the minimum of the loss of a batch under some advantages [b], each with weights of the rows [b]."""
    optimizer = torch.optim.LBFGS([policy.parameters[WEIGHT]], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        total, slope = 0.0, torch.zeros_like(policy.parameters[WEIGHT])
        for given, weights in parts:
            losses = algorithm.losses(policy, batch, given, Noise(0))
            found = [Loss(weights * loss.rows) for loss in losses]
            slope += gradient(policy, found)
            total += sum_of_rows(found).item() / len(batch.final)
        policy.parameters[WEIGHT].grad = slope
        return total

    optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    return policy


def told(proves: Proof, name: str, case: str, slope: float, explained: float) -> None:
    proves(name, "T7", case, "slope of implicit on real differences", slope, "1 ± 0.05")
    proves(name, "T7", case, "R²", explained, "above 0.99")


def of_prdp(kernel: str, seed: int, shared: bool = True, beta: float = BETA) -> Policy:
    """On 60 groups of the base model, which is enough: its fit is perfect."""
    policy = make_policy(dim=2, kernel=kernel)
    batch = sample_groups(policy, 60, 4, seed=seed, shared=shared)
    algorithm = prdp.Algorithm(WIDE.model_copy(update={"beta": beta}))
    given = algorithm.advantages(scores_of(reward(batch.final).view(-1, 4))).flatten().double()
    return descended(policy, algorithm, batch, [(given, torch.ones_like(given))])


@pytest.mark.parametrize("kernel", ["flow_sde", "cps", "dance_sde"])
def test_prdp(kernel: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    for seed in seeds:
        slope, explained = fit(of_prdp(kernel, seed), shared=True, seed=seed)
        measured(slope=slope, R2=explained)
        told(proves, "prdp", f"{kernel}, starts shared", slope, explained)
        assert slope == pytest.approx(1, abs=0.05)
        assert explained > 0.99


def of_d3po(seed: int, sharp: float = SHARP, **config: Any) -> Policy:
    """On 200 pairs; verdicts as Bradley and Terry say of sharp · r, both of each pair as often as they are given."""
    policy = make_policy(dim=2, logprob_reduction="sum")
    batch = sample_groups(policy, 200, 2, seed=seed)
    first = torch.tensor([1.0, -1.0]).double().repeat(200)
    chance = (sharp * (reward(batch.final[::2]) - reward(batch.final[1::2]))).sigmoid().repeat_interleave(2)
    algorithm = d3po.Algorithm(d3po.Config(**{**UNBOUND, **config}))
    return descended(policy, algorithm, batch, [(first, chance), (-first, 1 - chance)])


def test_d3po_by_trajectory(seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof):
    for seed in seeds:
        slope, explained = fit(of_d3po(seed), shared=True, scale=SHARP, seed=seed)
        measured(slope=slope, R2=explained)
        told(proves, "d3po", "level: trajectory, in expectation over verdicts", slope, explained)
        assert slope == pytest.approx(1, abs=0.05)
        assert explained > 0.99


# --- negative controls


def test_with_starts_of_their_own_rewards_are_not_explained(measured: Callable[..., None]):
    """Where the chain does not forget them: Flow-SDE of little noise. The coefficients are right all the same."""
    policy = at_the_optimum(BETA, noise_level=0.3)
    (slope, explained), shared = fit(policy, shared=False), fit(policy, shared=True)
    measured(slope=slope, R2=explained, shared=shared[1])
    assert shared[1] > 0.999999
    assert explained < 0.9


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda: fit(of_prdp("flow_sde", 0, beta=1.2 * BETA), shared=True), id="PRDP, another beta"),
        pytest.param(lambda: fit(of_d3po(0, beta=1.3 * BETA), True, SHARP), id="D3PO, another beta"),
        pytest.param(lambda: fit(of_d3po(0, level="step"), True, SHARP), id="D3PO by step"),
        pytest.param(lambda: fit(of_d3po(0, discount=0.5), True, SHARP), id="D3PO discounted"),
        pytest.param(lambda: fit(of_d3po(0, sharp=2 * SHARP), True, SHARP), id="D3PO, verdicts surer than rewards"),
        pytest.param(lambda: fit(make_policy(dim=2), shared=True), id="the base model"),
    ],
)
def test_another_objective_has_another_slope(broken: Callable[[], tuple[float, float]], measured: Callable[..., None]):
    slope, explained = broken()
    measured(slope=slope, R2=explained)
    assert abs(slope - 1) > 0.05 or explained < 0.99


# --- PRDP's gradient where its optimum is


def test_nothing_is_left_at_the_optimum():
    policy = at_the_optimum(BETA)
    batch = sample_groups(policy, 100, 4, seed=0)
    algorithm = prdp.Algorithm(WIDE)
    given = algorithm.advantages(scores_of(reward(batch.final).view(-1, 4))).flatten().double()
    found = list(algorithm.losses(policy, batch, given, Noise(0)))
    assert sum_of_rows(found).item() == pytest.approx(0, abs=1e-9)
    assert gradient(policy, found).abs().max() < 1e-5
    other = prdp.Algorithm(WIDE.model_copy(update={"beta": 1.1 * BETA}))
    assert gradient(policy, other.losses(policy, batch, given, Noise(0))).abs().max() > 1e-2


def test_with_starts_of_their_own_the_gradient_still_rests_there(measured: Callable[..., None]):
    """The start's share of the reward is an error that no step can explain, and that none is blamed for on average."""
    policy = at_the_optimum(BETA)

    def off_by(beta: float) -> float:
        algorithm, found = prdp.Algorithm(WIDE.model_copy(update={"beta": beta})), list[Tensor]()
        for seed in range(60):
            batch = sample_groups(policy, 50, 4, seed, shared=False)
            given = algorithm.advantages(scores_of(reward(batch.final).view(-1, 4))).flatten().double()
            found.append(gradient(policy, algorithm.losses(policy, batch, given, Noise(0))))
        stacked = torch.stack(found).view(60, 2, 3, 3)[:, :, :2]
        return float((stacked.mean(0).abs() / (stacked.std(0) / 60**0.5)).max())

    measured(off=off_by(BETA), another=off_by(1.1 * BETA))
    assert off_by(BETA) < 4
    assert off_by(1.1 * BETA) > 6


# --- sign and monotonicity


def of_steps(policy: Policy, batch: Trajectory) -> Tensor:
    """[b, K] log-ratios of each step."""
    found: list[Tensor] = []
    for slot in range(batch.num_kept):
        steps = [fixed_step(policy, name, batch, slot).gaussian for name in ("policy", "reference")]
        own, reference = (step.log_prob(batch.x_next[:, slot], "sum") for step in steps)
        found.append(own - reference)
    return torch.stack(found, 1)


@torch.no_grad()
def gains(policy: Policy, batch: Trajectory) -> Tensor:
    """[b] what the velocity's error has fallen by, mean over times."""

    def fallen(at: Noised) -> Tensor:
        reference = fixed_velocity(policy, "reference", batch, at)
        return error(reference, at, "uniform") - error(velocity(policy, batch, at), at, "uniform")

    settings = dpo.Config(num_times=3)
    return torch.stack([fallen(at) for at in at_times(settings, batch, Noise(9))]).mean(0)


STEPWISE: dict[str, tuple[Algorithm, Any, Callable[[Policy, Trajectory], Tensor]]] = {
    "d3po": (d3po.Algorithm(d3po.Config()), sample_groups, lambda policy, batch: of_steps(policy, batch).sum(1)),
    "dpo": (dpo.Algorithm(dpo.Config(num_times=3)), data_groups, gains),
    "kto": (kto.Algorithm(kto.Config(num_times=3)), data_groups, gains),
}


@pytest.mark.parametrize("name", STEPWISE)
def test_what_scores_more_becomes_likelier(
    name: str, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    """Means over fifths of fresh samples by reward, and the slope's sign; flipped verdicts turn it round."""
    algorithm, drawn, gained = STEPWISE[name]
    for seed in seeds:
        slopes: list[float] = []
        for sign in (1.0, -1.0):
            policy = make_policy(dim=2)
            groups = [drawn(policy, 60, 6, 100 * seed + step) for step in range(6)]
            rewards_while_training(policy, algorithm, groups.__getitem__, 6, sign, lr=0.05)
            fresh = drawn(make_policy(dim=2), 2000, 2, 77 + seed)
            fifths = by_fifths(reward(fresh.final), sign * gained(policy, fresh))
            slopes.append(fifths[-1] - fifths[0])
            assert rises(fifths)
        measured(right=slopes[0], flipped=slopes[1])
        proves(
            name, "T7", "by step or sample", "rise of implicit rewards over fifths of the real", slopes[0], "above 0"
        )


def test_a_policy_that_has_not_moved_gains_nothing():
    policy = make_policy(dim=2)
    fresh = data_groups(policy, 20, 2, 0)
    assert (gains(policy, fresh) == 0).all() and (weight(policy) == 0).all()
