"""What forward-process methods share, how they are each other's special cases, and where the anchored ones rest."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import awm, dgpo, epg, fpo, nft, ram, rvm
from rlalign.algorithms.base import Algorithm
from rlalign.algorithms.forward import (
    Noised,
    Ramp,
    TimeSettings,
    at_times,
    beyond,
    distance,
    draw_times,
    fixed_velocity,
    group_index,
    group_mean,
    likelihood,
    time_weight,
    velocities,
)
from rlalign.mdp.noise import Noise
from rlalign.models.base import Unusable

from .chains import make_policy, weight
from .gaussians import GRID, data, gradient, in_errors, moved, tilted

# --- the error of a velocity, by hand: x0 = 1, ε = 3, t = ½, so x_t = 2 and u = 2; v = 1.5 misses it by ½, x0 by ¼


@pytest.fixture
def at() -> Noised:
    one = torch.ones(1, 1).double()
    return Noised(one, 2 * one, torch.tensor([0.5]).double(), 3 * one)


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("uniform", 0.25),
        ("t", 0.125),
        ("t2", 0.0625),
        ("elbo", 0.25),
        ("flow_sde", 0.25 / 0.98),
        ("adaptive", 0.25),  # (¼)² / ¼
        ("huber", 0.5 * (0.5 - 1e-5)),
        ("ghuber", 0.5 / 0.25 * (0.25**0.25 - 1e-10**0.25)),
    ],
)
def test_likelihoods(at: Noised, weighting: Any, expected: float):
    assert likelihood(1.5 * torch.ones(1, 1).double(), at, weighting).tolist() == pytest.approx([-expected])
    assert likelihood(at.velocity, at, weighting).tolist() == pytest.approx([0.0])


def test_the_bound_of_the_log_likelihood():
    """-∫ (1-t)/t (e_θ - e_true) dt = log p_θ - log p, on average over p, for two Gaussian laws: minus their KL."""
    t = (torch.arange(4000).double() + 0.5) / 4000
    mean = 0.7
    missed = (mean * t / (t.square() + (1 - t).square())).square()  # e_θ - e_true at every x_t
    kl = float((time_weight(t, "elbo") * missed).mean())
    assert kl == pytest.approx(mean**2 / 2, rel=1e-3)


def test_flow_sde_weight_is_one_over_twice_the_variance():
    t = torch.tensor([0.2, 0.9, 0.995]).double()
    std = 0.7 * (t / (1 - t.clamp(max=0.99))).sqrt()
    assert torch.allclose(time_weight(t, "flow_sde"), 1 / (2 * std.square()))


def test_a_distance_is_weighted():
    v, fixed = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    at = Noised(v, v, torch.tensor([0.25]), v)
    assert distance(v, fixed, at, "elbo").tolist() == pytest.approx([3 * 2.5])


@pytest.mark.parametrize(("favour", "still"), [(1.0, [False, False, True]), (-1.0, [True, False, False])])
def test_beyond_the_clip_range_in_the_favoured_direction(favour: float, still: list[bool]):
    assert beyond(torch.tensor([0.7, 1.05, 1.3]), torch.full((3,), favour), 0.2, 0.1).tolist() == still


def test_ramps():
    rule = Ramp(start=0.25, flat=10, rate=0.01, max=0.4)
    assert [rule.at(n) for n in (0, 9, 10, 20, 100)] == pytest.approx([0.25, 0.25, 0.25, 0.35, 0.4])


# --- groups and times


def test_groups_are_told_apart_by_their_address_and_averaged():
    index = group_index(data(make_policy(), 0, rows=6, samples=2).take(torch.tensor([0, 1, 4, 5, 3])))
    assert (index[0] == index[1]) and (index[2] == index[3]) and len(set(index.tolist())) == 3
    values = torch.tensor([1.0, 3.0, 5.0, 9.0, 7.0])
    assert group_mean(values, index).tolist() == [2, 2, 7, 7, 7]
    weights = torch.tensor([3.0, 1.0, 1.0, 3.0, 2.0])
    assert group_mean(values, index, weights).tolist() == [1.5, 1.5, 8, 8, 7]


def test_times_of_the_grid_are_levels_within_the_range():
    sample = data(make_policy(num_steps=8), 0, rows=30)
    levels = [s for s in sample.schedule.sigma[:-1].double().tolist() if 0.5 <= s <= 0.95]
    times = draw_times(TimeSettings(num_times=3, time_range=(0.5, 0.95)), sample, Noise(0))
    assert all(len({*row}) == 3 and {*row} <= {*levels} for row in times.tolist())
    with pytest.raises(Unusable, match=r"num_times: 7 is more than the rollout's \d levels within"):
        draw_times(TimeSettings(num_times=7, time_range=(0.5, 0.95)), sample, Noise(0))


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_drawn_times_are_stratified(times: Any):
    settings = TimeSettings(times=times, num_times=4, time_shift=3.0)
    drawn = draw_times(settings, data(make_policy(), 0, rows=200), Noise(0))
    unshifted = drawn / (3 - 2 * drawn)
    quantiles = unshifted if times == "uniform" else torch.special.ndtr(unshifted.logit())
    assert torch.equal((4 * quantiles).floor(), torch.arange(4).double().expand(200, 4))


@pytest.mark.parametrize("times", ["grid", "uniform"])
def test_a_group_shares_its_times_and_its_noise(times: Any):
    sample = data(make_policy(), 0, rows=4, samples=2)
    for at in at_times(TimeSettings(times=times, num_times=2), sample, Noise(0), by_group=True):
        assert torch.equal(at.t[::2], at.t[1::2])
        assert torch.equal(at.epsilon[::2], at.epsilon[1::2])
        assert not torch.equal(at.epsilon[0], at.epsilon[2])
    for at in at_times(TimeSettings(times=times, num_times=2), sample, Noise(0)):
        assert not torch.equal(at.epsilon[0], at.epsilon[1])


def test_velocities_under_other_weights_have_no_graph():
    policy = moved(tilted(0.5))
    (at,) = at_times(TimeSettings(num_times=1), data(policy, 0, rows=3), Noise(0))
    v, fixed = velocities(policy, data(policy, 0, rows=3), at, ["old", "reference"])
    assert v.requires_grad and not any(other.requires_grad for other in fixed.values())
    assert torch.equal(fixed["policy"], v)
    offsets = fixed["reference"] - fixed["old"]
    assert torch.allclose(offsets, (0.5 * at.t / (at.t.square() + (1 - at.t).square())).reshape(offsets.shape))


def test_a_guided_reference_needs_negative_prompts():
    policy, sample = make_policy(), data(make_policy(), 0, rows=3)
    (at,) = at_times(TimeSettings(num_times=1), sample, Noise(0))
    with pytest.raises(Unusable, match="encodes no negative prompts"):
        fixed_velocity(policy, "reference", sample, at, guidance=4.5)


# --- special cases of each other: gradients in units of RVM's, at a place that is no optimum


KAPPA, BOUND = 0.4, 5.0
PLAIN: dict[str, Any] = {"weighting": "uniform", **GRID}
RVM = rvm.Algorithm(rvm.Config(**PLAIN))


def same_gradient(one: Algorithm, two: Algorithm, factor: float, away: bool) -> bool:
    """one = factor * two, where the policy is ``away`` from its copies or not; the copies are the reference."""
    policy = tilted(0.0)
    policy = moved(policy) if away else policy
    sample = data(policy, 0)
    advantages = (2 * torch.randn(len(sample.final), generator=torch.Generator().manual_seed(1))).clamp(-5, 5).double()
    ours, theirs = (gradient(algorithm, policy, sample, advantages) for algorithm in (one, two))
    return torch.allclose(ours, factor * theirs, rtol=1e-9, atol=1e-12)


def nft_with(beta: float) -> Algorithm:
    return nft.Algorithm(nft.Config(beta=beta, adv_clip=BOUND, kl_weight=0.0, weighting="uniform", num_times=3))


def ram_with(kappa: float, baseline: Any) -> Algorithm:
    return ram.Algorithm(ram.Config(kappa=kappa, baseline=baseline, **PLAIN))


def test_nft_is_ram_with_the_old_policy_for_a_reference():
    beta = 1 / (KAPPA * BOUND)
    assert same_gradient(nft_with(beta), ram_with(KAPPA, "old"), BOUND * beta, away=True)
    assert not same_gradient(nft_with(2 * beta), ram_with(KAPPA, "old"), 2 * BOUND * beta, away=True)


def test_ram_is_rvm_with_an_anchor():
    anchored = rvm.Algorithm(rvm.Config(kl_weight=1 / KAPPA, **PLAIN))
    assert same_gradient(ram_with(KAPPA, "policy"), anchored, KAPPA, away=True)
    assert not same_gradient(ram_with(KAPPA, "old"), anchored, KAPPA, away=True)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_at_its_old_weights_is_rvm_without_an_anchor(beta: float):
    assert same_gradient(nft_with(beta), RVM, 1.0, away=False)
    assert not same_gradient(nft_with(beta), RVM, 1.0, away=True)


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(awm.Algorithm(awm.Config(kl_weight=0, teacher_weight=0, **PLAIN)), id="awm"),
        pytest.param(
            awm.Algorithm(awm.Config(kl_weight=0, teacher_weight=0, estimate="sample", **PLAIN)), id="awm, one ratio"
        ),
        pytest.param(fpo.Algorithm(fpo.Config(updates_per_step=1, **PLAIN)), id="fpo"),
        pytest.param(epg.Algorithm(epg.Config(old_decay=Ramp(rate=0, max=0), **PLAIN)), id="epg"),
    ],
)
def test_with_a_single_update_a_ratio_is_one_and_leaves_rvm(algorithm: Algorithm):
    assert algorithm.needs.copies == ()
    assert same_gradient(algorithm, RVM, 1.0, away=True)


def test_dgpo_starts_as_half_of_rvm():
    """σ(0) = ½; groups of one, so that they share nothing."""
    assert same_gradient(dgpo.Algorithm(dgpo.Config(kl_weight=0.1, **PLAIN)), RVM, 0.5, away=False)
    assert not same_gradient(dgpo.Algorithm(dgpo.Config(kl_weight=0, **PLAIN)), RVM, 0.5, away=True)


# --- where an anchored loss rests: v_θ - v_ref = Cov_{π_θ}(r, u | x_t) / β, for r = a x0 on N(0, 1) that of N(a / β, 1)


SLOPE, BETA = 0.6, 1.5
SHIFT = SLOPE / BETA


def reward(x0: Tensor) -> Tensor:
    """Centred as a large group would."""
    return SLOPE * (x0 - SHIFT)


def anchored(name: str, beta: float = BETA, **config: Any) -> Algorithm:
    common: dict[str, Any] = {**GRID, "weighting": "uniform", "kl_weight": beta, **config}
    match name:
        case "rvm":
            return rvm.Algorithm(rvm.Config(**common))
        case "awm":
            return awm.Algorithm(awm.Config(teacher_weight=0, **common))
        case "epg":
            return epg.Algorithm(epg.Config(clip_range=None, **common))
        case _:
            common["kl_weight"] = 0.0
            return ram.Algorithm(ram.Config(kappa=1 / beta, baseline="policy", **common))


@pytest.mark.parametrize("name", ["rvm", "awm", "epg", "ram"])
def test_anchored_losses_rest_at_the_tilt(name: str):
    assert in_errors(anchored(name), tilted(SHIFT), reward, SHIFT) < 3


@pytest.mark.parametrize("weighting", ["t", "t2"])
def test_any_time_weight_will_do_if_the_anchor_has_it_too(weighting: str):
    algorithm = anchored("rvm", weighting=weighting, kl_weighting=weighting)
    assert in_errors(algorithm, tilted(SHIFT), reward, SHIFT) < 3


def test_ram_with_an_anchor_of_its_own_goes_half_the_way():
    algorithm = ram.Algorithm(ram.Config(kappa=2 / BETA, kl_weight=1.0, weighting="uniform", **GRID))
    assert in_errors(algorithm, tilted(SHIFT), reward, SHIFT) < 3


@pytest.mark.parametrize(
    ("name", "config", "sign", "mean"),
    [
        pytest.param("rvm", {}, -1.0, SHIFT, id="sign flipped"),
        pytest.param("rvm", {"beta": 1.3 * BETA}, 1.0, SHIFT, id="another anchor"),
        pytest.param("rvm", {"weighting": "t"}, 1.0, SHIFT, id="another time weight than the anchor's"),
        pytest.param("awm", {"kl_weighting": "t2"}, 1.0, SHIFT, id="another time weight than the policy's"),
        pytest.param("ram", {"beta": 1.3 * BETA}, 1.0, SHIFT, id="another kappa"),
        pytest.param("ram", {}, -1.0, SHIFT, id="ram with the sign flipped"),
        pytest.param("rvm", {}, 1.0, 0.0, id="samples of the reference instead of the policy"),
    ],
)
def test_and_nowhere_else(name: str, config: dict[str, Any], sign: float, mean: float):
    policy = tilted(SHIFT)
    assert in_errors(anchored(name, **config), policy, lambda x: sign * reward(x), mean, batches=15) > 6


def test_descent_arrives_at_the_tilt():
    """From the reference, on 60 fresh batches of what the policy would sample: within 3 % of the velocity's change."""
    policy, algorithm, seen = tilted(0.0), anchored("rvm"), list[Tensor]()
    unit, change = (weight(tilted(mean)).detach()[0, :, -1] for mean in (1.0, SHIFT))
    for batch in range(60):
        constants = weight(policy).detach()[0, :, -1]
        sample = data(policy, batch, mean=float(constants @ unit / unit.square().sum()))  # least squares over levels
        rewards = SLOPE * sample.final.flatten()
        step = gradient(algorithm, policy, sample, rewards - rewards.mean())
        with torch.no_grad():
            weight(policy).sub_(0.5 / (1 + batch / 20) * step)
        seen.append(weight(policy).detach()[0].clone())
    slopes, constants = torch.stack(seen[30:]).mean(0).unbind(1)
    assert float((constants - change).norm() / change.norm()) < 0.03
    assert float(slopes.norm() / change.norm()) < 0.03
