"""GRPO's loss on a small chain: what is penalised, what is clipped, what is logged."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlalign.algorithms.base import Loss
from rlalign.algorithms.grpo import OVERLAY, PRESETS, Algorithm, Config
from rlalign.algorithms.losses import step_weights
from rlalign.mdp.noise import Noise
from rlalign.models.lora import LoraConfig, attach
from rlalign.policy import Policy, Window, draw_steps
from rlalign.runfile import merged
from rlalign.types import Trajectory
from tests import small

from .chains import WEIGHT, make_policy, sample, weight

ADVANTAGES = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, 0.0], dtype=torch.float64)


@pytest.fixture
def policy() -> Policy:
    return make_policy(dim=2, num_steps=4)


@pytest.fixture
def trajectory(policy: Policy) -> Trajectory:
    return sample(policy, len(ADVANTAGES), seed=0)


def losses(policy: Policy, trajectory: Trajectory, **config: Any) -> list[Loss]:
    return list(Algorithm(Config(**config)).losses(policy, trajectory, ADVANTAGES, Noise(0)))


def moved(policy: Policy, by: float = 0.05) -> Policy:
    with torch.no_grad():
        weight(policy)[:, :, -1] += by
    return policy


def gradient(policy: Policy, terms: list[Loss]) -> Tensor:
    policy.parameters[WEIGHT].grad = None
    for term in terms:
        term.rows.sum().backward()
    found = policy.parameters[WEIGHT].grad
    assert found is not None
    return found.clone()


def test_the_ratio_is_exactly_one_before_the_first_update(policy: Policy, trajectory: Trajectory):
    terms = losses(policy, trajectory)
    assert len(terms) == 3
    assert all((term.maxima["ratio/max_abs_dev"] == 0).all() for term in terms)
    assert all((term.means["clip_fraction"] == 0).all() for term in terms)
    assert torch.allclose(torch.stack([term.rows for term in terms]).sum(0), -ADVANTAGES, rtol=0, atol=1e-12)


def test_a_moved_policy_is_clipped_on_the_favourable_side_alone(policy: Policy, trajectory: Trajectory):
    (term, *_) = losses(moved(policy, 0.3), trajectory, clip_range=1e-4)
    rho = term.means["ratio/mean"]
    clipped = ((rho > 1) & (ADVANTAGES > 0)) | ((rho < 1) & (ADVANTAGES < 0))
    bounded = -ADVANTAGES * rho.clamp(1 - 1e-4, 1 + 1e-4)
    assert clipped.any() and not clipped.all()
    assert torch.allclose(term.means["policy_loss"], torch.where(clipped, bounded, -ADVANTAGES * rho))
    assert (term.maxima["ratio/max_abs_dev"] == (rho - 1).abs()).all()


def test_an_asymmetric_range(policy: Policy, trajectory: Trajectory):
    (term, *_) = losses(moved(policy, 0.3), trajectory, clip_range=(0.001, 0.5))
    assert term.means["clip_fraction_high"].sum() == (term.means["ratio/mean"] > 1.5).sum()
    assert term.means["clip_fraction_low"].sum() == (term.means["ratio/mean"] < 0.999).sum() > 0


@pytest.mark.parametrize("form", ["gaussian", "no_tau", "mean_sq", "velocity"])
def test_every_penalty_has_the_gradient_of_its_value(policy: Policy, trajectory: Trajectory, form: str):
    """Against finite differences, with the policy term switched off by advantages of 0 that are kept."""
    config = {"kl_weight": 0.3, "kl_form": form, "zero_std_groups": "keep"}
    algorithm, silent = Algorithm(Config(**config)), torch.zeros_like(ADVANTAGES)

    def terms() -> list[Loss]:
        return list(algorithm.losses(policy, trajectory, silent, Noise(0)))

    def value() -> float:
        return torch.stack([term.rows.sum() for term in terms()]).sum().item()

    moved(policy)
    analytic = gradient(policy, terms())
    flat, h = policy.parameters[WEIGHT].data.view(-1), 1e-5
    for i in range(0, len(flat) - 3, 4):
        start = flat[i].item()
        flat[i] = start + h
        above = value()
        flat[i] = start - h
        below = value()
        flat[i] = start
        assert analytic.view(-1)[i].item() == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-10)
    assert analytic.abs().max() > 1e-4


def test_penalties_compare_as_their_formulas_say(policy: Policy, trajectory: Trajectory):
    moved(policy)
    by_form = {
        form: [term.means["kl"] for term in losses(policy, trajectory, kl_weight=1.0, kl_form=form)]
        for form in ("gaussian", "no_tau", "mean_sq", "velocity")
    }
    sigma = trajectory.schedule.sigma
    for slot in range(3):
        tau = (sigma[slot] - sigma[slot + 1]).item()
        std = policy.replay(trajectory, slot).gaussian.std.flatten()
        assert torch.allclose(by_form["no_tau"][slot], tau * by_form["gaussian"][slot])
        assert torch.allclose(by_form["gaussian"][slot], by_form["mean_sq"][slot] / (2 * std.square()))
        assert by_form["velocity"][slot].tolist() == pytest.approx([0.05**2] * 6)


def test_the_penalty_is_against_the_start_and_not_in_the_logged_policy_loss(policy: Policy, trajectory: Trajectory):
    at_start = losses(policy, trajectory, kl_weight=10.0)
    assert all((term.means["kl"] == 0).all() for term in at_start)
    moved(policy)
    with_penalty, without = (losses(policy, trajectory, kl_weight=w)[0] for w in (10.0, 0.0))
    assert torch.equal(with_penalty.means["policy_loss"], without.means["policy_loss"])
    assert torch.allclose(3 * (with_penalty.rows - without.rows), 10 * with_penalty.means["kl"])
    assert "kl" not in without.means


def test_under_lora_the_reference_is_the_net_without_its_adapter():
    full = make_policy(dim=2, num_steps=4)
    parameters = attach(full.family.nets, ["velocity"], LoraConfig(rank=2, alpha=2), ["residual"], seed=0)
    policy = Policy(full.family, full.settings, parameters, lora=True)
    trajectory = sample(policy, len(ADVANTAGES), seed=0)
    assert all((term.means["kl"] == 0).all() for term in losses(policy, trajectory, kl_weight=1.0))
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.1
    terms = losses(policy, trajectory, kl_weight=1.0)
    assert all((term.means["kl"] > 0).all() for term in terms)
    torch.stack([term.rows.sum() for term in terms]).sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in parameters.values())


def test_a_row_of_average_reward_feels_the_penalty(policy: Policy, trajectory: Trajectory):
    """Whether it does is a matter of its group, which the driver knows (regularise.weighed), not of its advantage."""
    moved(policy)
    (term, *_) = losses(policy, trajectory, kl_weight=3.0)
    silent = ADVANTAGES == 0
    assert (term.means["kl"][silent] > 0).all()
    assert torch.allclose(term.rows[silent], term.means["kl"][silent])  # 3 / K, K = 3


def test_no_reference_pass_without_a_penalty(policy: Policy, trajectory: Trajectory, monkeypatch: pytest.MonkeyPatch):
    passes: list[int] = []
    predict = policy.family.predict
    monkeypatch.setattr(policy.family, "predict", lambda *args: passes.append(1) or predict(*args))
    losses(policy, trajectory)
    assert len(passes) == 3
    losses(policy, trajectory, kl_weight=1.0)
    assert len(passes) == 3 + 6


def test_penalties_of_later_steps_are_credited_where_that_is_the_gradient_of_an_objective():
    assert Config(kl_credit="to_go", kl_weight=0.1).kl_credit == "to_go"
    for wrong in ({"kl_form": "no_tau"}, {"kl_form": "mean_sq"}, {"kl_form": "velocity"}, {"step_weight": "flash"}):
        with pytest.raises(ValidationError, match="set kl_form: gaussian and step_weight: none"):
            Config(**{"kl_credit": "to_go", "kl_weight": 0.1, **wrong})


@pytest.mark.parametrize("wrong", [{"clip_range": 0.0}, {"clip_range": (0.1, -0.1)}, {"kl_weight": -1}, {"beta": 1}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError):
        Config(**wrong)


@pytest.mark.parametrize("kind", ["tempflow", "flash"])
def test_a_weight_multiplies_the_policy_term_alone(policy: Policy, trajectory: Trajectory, kind: str):
    moved(policy)
    plain, weighed = (losses(policy, trajectory, kl_weight=0.5, step_weight=k) for k in ("none", kind))
    weights = step_weights(kind, policy, trajectory)  # pyright: ignore[reportArgumentType]
    assert weights.mean().item() == pytest.approx(1)
    assert weights.std() > 0.1
    for slot, (one, two) in enumerate(zip(plain, weighed, strict=True)):
        assert torch.allclose(two.means["policy_loss"], weights[:, slot] * one.means["policy_loss"])
        assert torch.equal(two.means["kl"], one.means["kl"])


def starts(steps: int, **window: Any) -> list[int]:
    settings = small.rollout_config(num_steps=10, window={"size": 3, "range": (1, 9), **window})
    drawn = [[draw_steps(settings, True, Noise(0), step, group)[1] for group in (0, 1)] for step in range(steps)]
    assert all(torch.equal(*groups) for groups in drawn)
    assert all(torch.equal(kept, torch.arange(3) + kept[0]) for kept, _ in drawn)
    return [int(kept[0]) for kept, _ in drawn]


def test_a_moving_window_is_where_the_training_step_says():
    assert starts(8, schedule="progressive", hold=2, stride=2) == [1, 1, 3, 3, 5, 5, 6, 6]
    assert starts(8, schedule="progressive", hold=2, stride=2, at_end="restart") == [1, 1, 3, 3, 5, 5, 1, 1]
    assert starts(16, schedule="decay", hold=4)[:13] == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5]
    assert starts(6, schedule="exp_decay", hold=2) == [1, 1, 2, 2, 3, 3]


def test_a_window_never_leaves_its_range_and_keeps_its_size():
    window = Window(size=4, schedule="progressive", hold=1)
    assert [window.moved(step, 25) for step in (0, 20, 21, 1000)] == [0, 20, 20, 20]
    assert (window.bounds(25), Window(size=1, range="first_half").bounds(25)) == ((0, 24), (0, 12))
    with pytest.raises(ValidationError, match="window of 3 steps does not fit"):
        small.rollout_config(num_steps=5, window={"size": 3, "range": "first_half"})


FLASH: dict[str, Any] = {
    **{"num_steps": 25, "shift": 3.0, "solver": "dpmpp_2m", "init_noise": "shared"},
    "window": {"size": 4, "schedule": "progressive", "hold": 2, "compress": 0.4},
}


@pytest.mark.parametrize(
    ("step", "last", "tail"),
    [
        (1, 3, [0.84, 0.72, 0.6, 0.48, 0.36, 0.24, 0.12, 0.0]),  # int(22 * 0.4) even points from 1 - 4/25 on
        (4, 5, [0.76 * left / 7 for left in range(7, -1, -1)]),  # int(20 * 0.4)
        (100, 20, [0.16, 0.0]),
    ],
)
def test_the_steps_behind_a_moving_window_are_compressed(step: int, last: int, tail: list[float]):
    """MixGRPO-Flash: the plain grid up to the window's last step, then few points; what is kept is replayed to the bit
    and trained, and the chain that is evaluated has all its steps."""
    sampler, learner = small.workers(Algorithm(Config()), small.rollout_config(**FLASH))
    trajectories = small.sample(sampler, step)
    sample = Trajectory.concat(trajectories)
    u = torch.tensor([*(1 - k / 25 for k in range(last + 1)), *tail], dtype=torch.float64)
    torch.testing.assert_close(sample.schedule.sigma.double(), 3 * u / (1 + 2 * u), rtol=0, atol=1e-6)
    assert (sample.steps == torch.arange(last - 3, last + 1)).all()
    metrics = learner.update(trajectories, torch.ones(len(small.PROMPTS), small.SAMPLES), step)
    assert metrics["ratio/max_abs_dev"] == 0.0
    assert len(sampler.policy.schedule(sampler.policy.settings).sigma) == 26


def test_a_compressed_chain_costs_what_is_left_of_it(monkeypatch: pytest.MonkeyPatch):
    passes: dict[float | None, int] = {}
    for share in (0.4, None):
        window = {**FLASH["window"], "compress": share}
        sampler, _ = small.workers(Algorithm(Config()), small.rollout_config(**{**FLASH, "window": window}))
        seen: list[int] = []
        predict = sampler.policy.family.predict
        monkeypatch.setattr(sampler.policy.family, "predict", lambda *args, p=predict, s=seen: s.append(1) or p(*args))
        small.sample(sampler)
        passes[share] = len(seen)
    assert passes[0.4] / passes[None] == 11 / 25  # type: ignore[index]


@pytest.mark.parametrize(
    ("window", "shift", "words"),
    [
        ({"schedule": "random"}, 3.0, "alike in all groups"),
        ({}, None, "shift, 3 for instance"),
        ({"range": (0, 22)}, 3.0, "end at 21 at most"),
    ],
)
def test_a_tail_that_cannot_be_compressed_is_refused(window: dict[str, Any], shift: float | None, words: str):
    with pytest.raises(ValidationError, match=words):
        small.rollout_config(**{**FLASH, "window": {**FLASH["window"], **window}, "shift": shift})


def test_published_recipes_train_all_steps_unless_they_have_a_window():
    for name in ("flow_grpo_sd35", "flow_grpo_flux", "dance_flux", "dance_grpo"):
        assert merged(OVERLAY, PRESETS[name])["rollout"]["window"] is None
    assert merged(OVERLAY, PRESETS["mix_grpo"])["rollout"]["window"]["schedule"] == "progressive"
