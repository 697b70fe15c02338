"""Gradients through the sampler, on a chain whose sample is an affine function of its noise."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import alignprop, draft, drtune, refl
from rlalign.algorithms.reward_gradients import RewardGradient, start
from rlalign.mdp.noise import Noise
from rlalign.models import analytic
from rlalign.policy import Policy
from rlalign.types import Prompt, Trajectory

from .chains import WEIGHT, make_policy, weight

STEPS, ROWS = 4, 6
NOISE = Noise(3)
Q = torch.tensor([0.9, -0.4], dtype=torch.float64)


@pytest.fixture
def policy() -> Policy:
    policy = make_policy(dim=2, num_steps=STEPS)
    with torch.no_grad():
        weight(policy).copy_(torch.randn(weight(policy).shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    return policy


@pytest.fixture
def sample(policy: Policy) -> Trajectory:
    address = torch.stack([torch.full((ROWS,), 5), torch.arange(ROWS), torch.zeros(ROWS).long()], 1)
    empty = torch.empty(ROWS, 0, *policy.latent_shape)
    cond = {"log_weights": torch.zeros(ROWS, 1, dtype=torch.float64)}
    final = torch.zeros(ROWS, *policy.latent_shape, dtype=torch.float64)
    steps, prompts = torch.zeros(ROWS, 0).long(), (Prompt("a"),) * ROWS
    schedule = policy.schedule(policy.settings)
    version = torch.zeros(ROWS).long()
    return Trajectory(cond, None, schedule, steps, empty, empty, empty[:, :, 0], final, version, address, prompts)


def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """q y - |y|² / 2 of what the pictures show."""
    assert len(prompts) == len(images)
    y = analytic.numbers(images)
    return y.to(Q) @ Q - y.square().sum(1) / 2


def by_hand(policy: Policy, sample: Trajectory, trained: Sequence[int], around: bool = False) -> Tensor:
    """x' = x + (σ' - σ) v, written out; gradient [D, T, D + 1] of -mean r."""
    sigma, net = sample.schedule.sigma, policy.family.nets["velocity"]
    x = start(policy, sample, NOISE).flatten(1)
    for k in range(STEPS):
        seen = x.detach() if around else x
        v = net(seen, sigma[k].expand(ROWS), sample.cond["log_weights"])
        x = x + (sigma[k + 1] - sigma[k]) * (v if k in trained else v.detach())
        x = x.detach() if k + 1 < STEPS and not any(step <= k for step in trained) else x
    value = (x @ Q - x.square().sum(1) / 2).mean()
    (gradient,) = torch.autograd.grad(-value, policy.parameters[WEIGHT])
    return gradient.view_as(weight(policy))


def gradient(algorithm: RewardGradient, policy: Policy, sample: Trajectory) -> Tensor:
    algorithm.reward = reward
    losses = list(algorithm.losses(policy, sample, torch.ones(ROWS), NOISE))  # pyright: ignore
    torch.stack([loss.rows.mean() for loss in losses]).sum().backward()
    found = policy.parameters[WEIGHT].grad
    assert found is not None
    policy.parameters[WEIGHT].grad = None
    return found.view_as(weight(policy))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("last_steps", [1, 2, STEPS, 99])
def test_draft_goes_through_the_last_steps(policy: Policy, sample: Trajectory, last_steps: int, checkpointing: bool):
    algorithm = draft.Algorithm(draft.Config(last_steps=last_steps, checkpointing=checkpointing))
    expected = by_hand(policy, sample, range(max(0, STEPS - last_steps), STEPS))
    torch.testing.assert_close(gradient(algorithm, policy, sample), expected, rtol=1e-5, atol=1e-7)  # float32 pictures


def test_the_gradient_is_that_of_finite_differences(policy: Policy, sample: Trajectory):
    """Of the sample itself, which no truncation makes wrong when all steps have a graph."""
    found, width = gradient(draft.Algorithm(draft.Config(last_steps=STEPS)), policy, sample), 1e-4

    def value() -> Tensor:
        net, x = policy.family.nets["velocity"], start(policy, sample, NOISE).flatten(1)
        for now, nxt in sample.schedule.sigma.unfold(0, 2, 1):
            x = x + (nxt - now) * net(x, now.expand(ROWS), sample.cond["log_weights"])
        return (x @ Q - x.square().sum(1) / 2).mean()

    flat = policy.parameters[WEIGHT].data.view(-1)
    for place in range(0, flat.numel(), 5):
        with torch.no_grad():
            flat[place] += width
            above = value()
            flat[place] -= 2 * width
            below = value()
            flat[place] += width
        assert found.reshape(-1)[place].item() == pytest.approx(-float(above - below) / (2 * width), abs=1e-5)


def test_drtune_goes_around_the_nets_input(policy: Policy, sample: Trajectory):
    algorithm = drtune.Algorithm(drtune.Config(trained_steps=2))
    trained = algorithm.steps(STEPS, 5, NOISE)
    assert len(trained) == 2 and trained[1] - trained[0] == STEPS // 2
    expected = by_hand(policy, sample, trained, around=True)
    found = gradient(algorithm, policy, sample)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    through = by_hand(policy, sample, trained)
    assert not torch.allclose(found, through, rtol=1e-2)


def test_alignprop_truncates_anew_for_every_batch(policy: Policy, sample: Trajectory):
    algorithm = alignprop.Algorithm(alignprop.Config())
    drawn = [algorithm.last_steps(STEPS, step, NOISE) for step in range(200)]
    assert set(drawn) == {1, 2, 3, 4}
    expected = by_hand(policy, sample, range(STEPS - drawn[5], STEPS))
    torch.testing.assert_close(gradient(algorithm, policy, sample), expected, rtol=1e-5, atol=1e-7)
    late = alignprop.Algorithm(alignprop.Config(truncation="gaussian"))
    steps = torch.tensor([50.0 - late.last_steps(50, step, NOISE) for step in range(400)])
    assert steps.mean().item() == pytest.approx(42, abs=1) and steps.std().item() == pytest.approx(5, abs=0.8)
    assert alignprop.Algorithm(alignprop.Config(truncation="fixed", last_steps=9)).last_steps(4, 0, NOISE) == 4


@pytest.mark.parametrize("checkpointing", [True, False])
def test_draft_lv_makes_its_graphs_again(
    policy: Policy, sample: Trajectory, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    """The gradient is the same to the bit, for a second pass of each copy."""
    passes: list[int] = []
    predict = policy.family.predict
    monkeypatch.setattr(policy.family, "predict", lambda *args: passes.append(1) or predict(*args))
    found = gradient(draft.Algorithm(draft.Config(noised_copies=2, checkpointing=checkpointing)), policy, sample)
    assert len(passes) == (4 if checkpointing else 2)
    plain = gradient(draft.Algorithm(draft.Config(noised_copies=2, checkpointing=False)), policy, sample)
    assert torch.equal(found, plain)


def test_refl_goes_on_with_pre_training(policy: Policy, sample: Trajectory):
    """w mean (v - u)² on the images of the batch, beside a reward that is good enough."""
    images = torch.randn(sample.final.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    algorithm = refl.Algorithm(refl.Config(pretraining=0.3, enough=-1e9))
    assert algorithm.needs.recorded and not refl.Algorithm(refl.Config()).needs.recorded
    data = replace(sample, final=images)
    t = NOISE.uniform("train/times", sample.address, 0, (1,)).double()
    epsilon = NOISE.normal("train/noise", sample.address, 0, policy.latent_shape, torch.float64).flatten(1)
    x0 = images.flatten(1)
    v = policy.family.nets["velocity"]((1 - t) * x0 + t * epsilon, t.flatten(), sample.cond["log_weights"])
    value = 0.3 * (v - (epsilon - x0)).square().mean()
    (expected,) = torch.autograd.grad(value, policy.parameters[WEIGHT])
    torch.testing.assert_close(
        gradient(algorithm, policy, data), expected.view_as(weight(policy)), rtol=1e-4, atol=1e-6
    )


def test_draft_lv_noises_the_sample_again(policy: Policy, sample: Trajectory):
    """n gradients of one step each, from points that have the sample's own clean latent."""
    found = gradient(draft.Algorithm(draft.Config(noised_copies=3)), policy, sample)
    sigma, net = sample.schedule.sigma[STEPS - 1], policy.family.nets["velocity"]
    parts: list[Tensor] = []
    for copy in range(3):
        epsilon = NOISE.normal("train/noise", sample.address, copy, policy.latent_shape).to(sample.final)
        x = ((1 - sigma) * sample.final + sigma * epsilon).flatten(1)
        clean = x - sigma * net(x, sigma.expand(ROWS), sample.cond["log_weights"])
        parts.append((clean @ Q - clean.square().sum(1) / 2).mean())
    (expected,) = torch.autograd.grad(-torch.stack(parts).mean(), policy.parameters[WEIGHT])
    torch.testing.assert_close(found, expected.view_as(found), rtol=1e-5, atol=1e-7)


def test_refl_looks_at_the_clean_latent_of_a_late_step(policy: Policy, sample: Trajectory):
    algorithm = refl.Algorithm(refl.Config(late=(0.5, 1.0)))
    assert {algorithm.step(STEPS, step, NOISE) for step in range(50)} == {2, 3}
    at, sigma, net = algorithm.step(STEPS, 5, NOISE), sample.schedule.sigma, policy.family.nets["velocity"]
    x = start(policy, sample, NOISE).flatten(1)
    with torch.no_grad():
        for k in range(at):
            x = x + (sigma[k + 1] - sigma[k]) * net(x, sigma[k].expand(ROWS), sample.cond["log_weights"])
    clean = x - sigma[at] * net(x, sigma[at].expand(ROWS), sample.cond["log_weights"])
    (expected,) = torch.autograd.grad(-(clean @ Q - clean.square().sum(1) / 2).mean(), policy.parameters[WEIGHT])
    torch.testing.assert_close(
        gradient(algorithm, policy, sample), expected.view_as(weight(policy)), rtol=1e-5, atol=1e-7
    )
    enough = refl.Algorithm(refl.Config(late=(0.5, 1.0), enough=-1e9))
    assert not gradient(enough, policy, sample).any()
