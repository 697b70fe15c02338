"""CRD: the centred regression, where it rests, and its three sets of weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms.crd import PRESETS, Algorithm, Config, Form, centred_loss, reward_adaptive
from rlalign.algorithms.forward import at_times
from rlalign.mdp.noise import Noise
from rlalign.models import analytic
from rlalign.models.lora import full
from rlalign.policy import Policy
from rlalign.types import Trajectory
from rlalign.workers.learner import Learner
from rlalign.workers.optimizer import OptimizerConfig
from rlalign.workers.sampler import Sampler
from tests.small import PROMPTS, rollout_config, sample
from tests.test_loop import place as place
from tests.test_loop import run

from .chains import WEIGHT, weight
from .gaussians import GRID, data, in_errors, moved, passes, tilted

ONE_GROUP = torch.zeros(3, dtype=torch.int64)
IMPLICIT, TARGETS = torch.tensor([0.1, 0.3, -0.1]).double(), torch.tensor([0.5, 0.9, 0.1]).double()


def test_the_square_by_hand():
    losses = centred_loss(IMPLICIT, TARGETS, ONE_GROUP, 2.0, "square", None)
    assert losses.tolist() == pytest.approx([0.0, (0.4 - 0.4) ** 2, (-0.4 + 0.4) ** 2])
    losses = centred_loss(IMPLICIT, TARGETS, ONE_GROUP, 1.0, "square", None)
    assert losses.tolist() == pytest.approx([0.0, 0.04, 0.04])


def test_softmax_centres_are_two_weighted_means():
    computed = centred_loss(IMPLICIT, TARGETS, ONE_GROUP, 1.0, "square", 0.5)
    expected = torch.zeros(3).double()
    for sign in (1, -1):
        p = (sign * TARGETS / 0.5).softmax(0)
        expected += (IMPLICIT - (p * IMPLICIT).sum() - TARGETS + (p * TARGETS).sum()).square() / 2
    assert torch.allclose(computed, expected)
    flat = centred_loss(IMPLICIT, TARGETS, ONE_GROUP, 1.0, "square", 1e6)
    assert torch.allclose(flat, centred_loss(IMPLICIT, TARGETS, ONE_GROUP, 1.0, "square", None), atol=1e-5)


@pytest.mark.parametrize("form", ["square", "cross_entropy"])
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_a_constant_of_the_prompt_does_not_matter(form: Form, temperature: float | None):
    """Neither added to what the policy says (log Z) nor, without pools that depend on it, to the reward."""
    group = torch.tensor([0, 0, 2, 2])
    implicit, targets = torch.randn(4).double(), torch.rand(4).double()
    offset = torch.tensor([1.0, 1.0, -3.0, -3.0]).double()
    losses = centred_loss(implicit, targets, group, 0.7, form, temperature)
    assert torch.allclose(centred_loss(implicit + offset, targets, group, 0.7, form, temperature), losses)
    assert torch.allclose(centred_loss(implicit, targets + offset, group, 0.7, form, temperature), losses)
    other = centred_loss(implicit + torch.tensor([1.0, 0, 0, 0]), targets, group, 0.7, form, temperature)
    assert not torch.allclose(other, losses)


def test_the_centre_has_no_gradient():
    implicit = IMPLICIT.clone().requires_grad_()
    losses = centred_loss(implicit, TARGETS, ONE_GROUP, 1.0, "square", None)
    (gradient,) = torch.autograd.grad(losses[1], implicit)
    assert gradient.tolist() == pytest.approx([0.0, -0.4, 0.0])


def test_good_samples_are_held_to_the_reference():
    weights = 0.1 * reward_adaptive(torch.tensor([0.0, 0.5, 1.0]), 0.1)
    assert weights.tolist() == pytest.approx([1e-4, 0.05005, 0.1])


# --- where it rests, to leading order: δ = Cov(u|x_t)⁻¹ Cov(u, R|x_t) / (2 β), for N(0, 1) data and R = ½ + a x0
# -a t / (2 β): not the tilt, which has the shape t / ((1 - t)² + t²)


SLOPE, BETA, BOUND, GROUP = 0.02, 1.0, 50.0, 8
AT_REST: dict[str, Any] = {"beta": BETA, "adv_clip": BOUND, "self_normalized": False, "kl_weight": 0.0, **GRID}


def off_by(residual: float, tilt: bool = False, batches: int = 30, **config: Any) -> float:
    """Standard errors of the mean gradient at the residual velocity -residual t, the teacher being at 0."""
    policy = tilted(0.0)
    t = policy.schedule(policy.settings).sigma[:-1].double()
    with torch.no_grad():
        weight(policy)[0, :, -1] = -residual * (t / (t.square() + (1 - t).square()) if tilt else t)

    def advantages(x0: Tensor) -> Tensor:
        return 2 * BOUND * SLOPE * x0

    algorithm = Algorithm(Config(**AT_REST | config))
    return in_errors(algorithm, policy, advantages, batches=batches, samples=GROUP)


def test_it_rests_where_a_regression_sample_by_sample_does():
    assert off_by(SLOPE / (2 * BETA)) < 3


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"residual": -SLOPE / (2 * BETA)}, id="sign flipped"),
        pytest.param({"residual": SLOPE / BETA}, id="twice as far"),
        pytest.param({"residual": SLOPE / (2 * BETA), "beta": 2 * BETA}, id="another beta"),
        pytest.param({"residual": SLOPE / (2 * BETA), "tilt": True}, id="the tilt"),
    ],
)
def test_and_nowhere_else(other: dict[str, Any]):
    assert off_by(**other) > 6


# --- around the loss


def test_the_implicit_reward_is_measured_from_the_teacher():
    policy = tilted(0.5)
    sample, advantages = data(policy, 0, rows=8, samples=4), torch.randn(8).double()
    for loss in Algorithm(Config(**GRID)).losses(policy, sample, advantages, Noise(0)):
        assert (loss.means["implicit_reward"] == 0).all()
        assert (loss.means["kl"] > 0).all()
    for loss in Algorithm(Config(**GRID)).losses(moved(policy), sample, advantages, Noise(0)):
        assert (loss.means["implicit_reward"] != 0).all()


def test_three_sets_of_weights():
    policy = moved(tilted(0.0))
    algorithm = Algorithm(Config())
    assert (algorithm.sample_with, set(algorithm.needs.copies)) == ("old", {"old", "teacher"})
    decays = [algorithm.after_step(policy, updates=n) for n in (1, 75, 95)]
    assert [d["teacher_decay"] for d in decays] == pytest.approx([0.255, 0.625, 0.725])
    assert [d["old_decay"] for d in decays] == pytest.approx([0.0, 0.0, 0.15])
    assert torch.equal(policy.copies["old"][WEIGHT], policy.parameters[WEIGHT])


@pytest.mark.parametrize(("kl_weight", "expected"), [(0.0, 6), (0.1, 9)])
def test_passes(kl_weight: float, expected: int, monkeypatch: pytest.MonkeyPatch):
    assert passes(tilted(0.0), Algorithm(Config(kl_weight=kl_weight, **GRID)), monkeypatch) == expected


# --- the guided reference


PROMPTED, UNPROMPTED = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])


def test_the_adaptive_penalty_never_turns_round():
    """Below 1e-4, where a target may bring β_KL, all are held alike; not the worst more than the best."""
    worst_and_best = torch.tensor([0.0, 0.5, 1.0])
    assert (1e-3 * reward_adaptive(worst_and_best, 1e-3)).tolist() == pytest.approx([1e-4, 5.5e-4, 1e-3])
    assert (1e-5 * reward_adaptive(worst_and_best, 1e-5)).tolist() == pytest.approx([1e-5] * 3)


def guided(kl_guidance: float | None, guidance_scale: float = 1.0) -> tuple[Algorithm, Sampler, Learner]:
    """On a mixture whose conditions weigh its components; the policy has left the reference."""
    means, weights = [[0.0, 0.0], [2.0, 1.0]], {prompt.text: [1.0, 3.0] for prompt in PROMPTS}
    config = analytic.Config(means=means, prompt_weights=weights)
    family = analytic.Family.load(config, "", torch.float32, "cpu")
    settings = rollout_config(guidance_scale=guidance_scale)
    policy = Policy(family, settings, full(family.nets, ["velocity"]), lora=False)
    algorithm = Algorithm(Config(kl_guidance=kl_guidance, reward_adaptive_kl=False))
    learner = Learner(policy, algorithm, Noise(0), OptimizerConfig(), ema=None)
    needs = algorithm.needs
    sampler = Sampler(policy, Noise(0), "policy", needs.trajectory, shares=True, keep_uncond=needs.uncond)
    return algorithm, sampler, learner


def test_rollouts_without_guidance_are_held_to_a_reference_with_it():
    """v_ref = v(x, no prompt) + 4.5 (v(x, prompt) - v(x, no prompt)) of the untrained net, put together by hand."""
    algorithm, sampler, learner = guided(4.5)
    policy = moved(learner.policy)
    whole = Trajectory.concat(sample(sampler))
    rows = whole.take(torch.arange(whole.num_rows))
    assert rows.uncond is not None
    net, noise = policy.family.nets["velocity"], Noise(0)
    assert isinstance(net, analytic.Velocity)
    losses = list(algorithm.losses(policy, rows, torch.zeros(whole.num_rows), noise))
    for loss, at in zip(losses, at_times(algorithm.config, rows, noise), strict=True):
        with torch.no_grad():
            x = at.x.flatten(1)
            positive, negative = (net.exact(x, at.t, weights.log()) for weights in (PROMPTED, UNPROMPTED))
            own = net(x, at.t, PROMPTED.log())
        reference = negative + 4.5 * (positive - negative)
        assert (positive - negative).abs().max() > 0.1
        torch.testing.assert_close(loss.means["kl"], (own - reference).square().mean(1), rtol=1e-5, atol=1e-6)


def test_a_guided_reference_changes_no_sample():
    finals = [Trajectory.concat(sample(guided(scale)[1])) for scale in (None, 4.5)]
    assert torch.equal(finals[0].final, finals[1].final)
    assert finals[0].uncond is None and finals[1].uncond is not None


def test_negative_prompts_are_kept_only_where_they_are_asked_for():
    assert not Algorithm(Config()).needs.uncond
    assert not Algorithm(Config(kl_guidance=4.5, kl_weight=0.0)).needs.uncond
    algorithm, sampler, learner = guided(4.5)
    rows = Trajectory.concat(sample(sampler)).take(torch.arange(6))
    with pytest.raises(ValueError, match="encodes no negative prompts"):
        list(algorithm.losses(learner.policy, replace(rows, uncond=None), torch.zeros(6), Noise(0)))


def test_the_preset_is_the_papers():
    preset = PRESETS["crd_sd35"]
    assert preset["rollout"]["guidance_scale"] == 1.0
    config = Config(**preset["algorithm"])
    assert (config.kl_guidance, config.kl_weight, config.beta) == (4.5, 0.1, 1.0)


def test_a_run_file_can_ask_for_a_guided_reference(place: Path):
    rows, _ = run(place, "run", algorithm="crd", algorithm__kl_guidance=4.5)
    assert rows[-1]["kl"] > 0
