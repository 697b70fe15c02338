"""T10: faults of the machinery around an algorithm, injected, and what gives them away (EXACT_TESTS 7).

Those of objectives stand beside the rungs that they fail: rewards with the sign flipped, shuffled advantages, no
penalty, a divergence without τ, mean ratios under a sum, positives only, rewards that outgrow the penalty. A sampler
without weights refuses in tests/workers/test_weights.py.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms import grpo
from rlalign.algorithms.losses import ratio
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Window, draw_steps
from rlalign.reporting.watch import Watch, WatchConfig
from rlalign.types import Trajectory
from tests.algorithms.chains import WEIGHT, make_policy, weight

from .training import natural, roll_out, scores_of

SAMPLES = 8
DIRECTION = torch.tensor([1.0, -0.5, 0.25, 0.75], dtype=torch.float64)
QUIET = {"reward/zero_std_groups": 0.0}


def reward(y: Tensor) -> Tensor:
    return y.flatten(1) @ DIRECTION


# --- a clip range of another log-prob


CLIPS: dict[str, dict[str, Any]] = {
    "flow_sde": {"kernel": "flow_sde", "noise_level": 0.7},
    "dance_sde": {"kernel": "dance_sde", "noise_level": 0.3},
    "cps": {"kernel": "cps", "noise_level": 0.7},
    "cps unscaled": {"kernel": "cps", "noise_level": 0.7, "cps_logprob": "unscaled"},
}


def chain(name: str) -> Policy:
    return make_policy(4, 10, **CLIPS[name])


def fitting(name: str) -> float:
    """A clip range that about one ratio in eight leaves after the first of two updates."""
    policy = chain(name)
    sample = roll_out(policy, 100, SAMPLES, torch.Generator().manual_seed(1))
    with torch.no_grad():
        update(policy, algorithm(1.0), sample)
        ratios = [ratio(*policy.log_probs(sample, slot)) for slot in range(sample.num_kept)]
    return float((torch.stack(ratios) - 1).abs().quantile(0.75))


def algorithm(clip_range: float) -> grpo.Algorithm:
    return grpo.Algorithm(grpo.Config(advantage="loo", adv_clip=1e9, clip_range=clip_range, updates_per_step=2))


@torch.enable_grad()
def update(policy: Policy, chosen: grpo.Algorithm, sample: Trajectory) -> float:
    """One small step on the velocities' constants; the share of clipped ratios before it."""
    given = chosen.advantages(scores_of(reward(sample.final), SAMPLES)).flatten().double()
    clipped: list[Tensor] = []
    for loss in chosen.losses(policy, sample, given, Noise(0)):
        loss.rows.mean().backward()
        clipped.append(loss.means["clip_fraction"].mean())
    parameter = policy.parameters[WEIGHT]
    assert parameter.grad is not None
    with torch.no_grad():
        parameter.grad.view_as(weight(policy)).mul_(natural(policy, 1.0))
        parameter -= 0.05 * parameter.grad / parameter.grad.norm()
    parameter.grad = None
    return float(torch.stack(clipped).mean())


def watched(name: str, clip_range: float, steps: int = 5) -> tuple[float, dict[str, str]]:
    """Two updates a step, each on its half of the groups: the mean share of clipped ratios, and the last alarms."""
    policy, chosen, watch = chain(name), algorithm(clip_range), Watch(WatchConfig(), clip_range, 1e-15, (), updates=2)
    generator, shares, alarms = torch.Generator().manual_seed(2), list[float](), dict[str, str]()
    for _ in range(steps):
        sample = roll_out(policy, 100, SAMPLES, generator)
        halves = (sample.take(rows) for rows in torch.arange(100 * SAMPLES).chunk(2))
        shares.append(sum(update(policy, chosen, half) for half in halves) / 2)
        alarms = watch.step({**QUIET, "clip_fraction": shares[-1]})
    return sum(shares) / steps, alarms


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_range_of_its_own_is_left_by_few_ratios(name: str, measured: Callable[..., None]):
    share, alarms = watched(name, fitting(name))
    measured(share=share)
    assert 0.05 < share < 0.2 and not alarms


def test_a_range_of_unscaled_log_probs_clips_most_densities(measured: Callable[..., None]):
    share, alarms = watched("dance_sde", fitting("cps unscaled"))
    measured(share=share)  # of 0.5: fresh samples have no ratio but 1 at the first of two updates
    assert "clip_range" in alarms["clip_saturation"]


def test_a_range_of_densities_never_acts_on_unscaled_log_probs(measured: Callable[..., None]):
    """Their ratios are closer to 1, 2c² times: no alarm, but nothing is clipped either."""
    share, alarms = watched("cps unscaled", fitting("dance_sde"))
    measured(share=share)
    assert share < 0.01 and not alarms


# --- windows drawn for each request in place of each group


def rolled_out(steps: Callable[[int, int], tuple[Tensor, Tensor]], groups: int) -> Trajectory:
    """Rows of a group start from one noise; ``steps`` (group, sample) says which are stochastic and which are kept."""
    policy, generator = make_policy(1, 10, kernel="cps", noise_level=1.0), torch.Generator().manual_seed(0)
    rows, schedule = groups * SAMPLES, policy.schedule(policy.settings)
    places = [(group, sample) for group in range(groups) for sample in range(SAMPLES)]
    stochastic, kept = (torch.stack(part) for part in zip(*(steps(*place) for place in places), strict=True))
    cond = {"log_weights": torch.zeros(rows, 1, dtype=torch.float64)}
    start = torch.randn(groups, *policy.latent_shape, generator=generator, dtype=torch.float64)

    def noise(k: int) -> Tensor:
        return torch.randn(rows, *policy.latent_shape, generator=generator, dtype=torch.float64)

    start = start.repeat_interleave(SAMPLES, 0)
    made = policy.roll_out(start, cond, None, schedule, stochastic, kept, noise, policy.settings)
    parts = (made.x, made.x_next, made.log_probs, made.final)
    address = torch.tensor([(0, *place) for place in places])
    return Trajectory(cond, None, schedule, kept, *parts, torch.zeros(rows, dtype=torch.int64), address)


def variance_ratio(sample: Trajectory) -> float:
    """Variance of a group's rewards over that of its rows with one window: 1 where a group has one window."""
    rewards, steps = sample.final.flatten().view(-1, SAMPLES), sample.steps[:, 0].view(-1, SAMPLES)
    alike = (steps[:, :, None] == steps[:, None]).double()  # [P, G, G]
    around = rewards - (alike @ rewards[..., None])[..., 0] / alike.sum(2)
    windows = (1 / alike.sum(2)).sum()  # of all groups
    return float(rewards.var(1).mean() / (around.square().sum() / (rewards.numel() - windows)))


def test_windows_of_their_own_inflate_the_variance_of_a_group(measured: Callable[..., None]):
    policy = make_policy(1, 10, kernel="cps", noise_level=1.0, window=Window(size=1, range=(0, 9)))

    def of_group(group: int, sample: int) -> tuple[Tensor, Tensor]:
        return draw_steps(policy.settings, True, Noise(0), 0, group)

    def of_request(group: int, sample: int) -> tuple[Tensor, Tensor]:
        return draw_steps(policy.settings, True, Noise(0), 0, SAMPLES * group + sample)

    right, broken = variance_ratio(rolled_out(of_group, 100)), variance_ratio(rolled_out(of_request, 1500))
    measured(right=right, broken=broken)
    assert right == pytest.approx(1, abs=1e-9)
    assert broken > 1.03


# --- latents rounded after they were scored


def test_rounded_latents_are_no_longer_those_of_their_log_probs(measured: Callable[..., None]):
    policy, chosen = chain("flow_sde"), algorithm(1e-4)
    sample = roll_out(policy, 10, SAMPLES, torch.Generator().manual_seed(0))
    rounded = replace(sample, x_next=sample.x_next.bfloat16().to(sample.x_next))
    given = chosen.advantages(scores_of(reward(sample.final), SAMPLES)).flatten().double()
    for batch, expected in ((sample, set[str]()), (rounded, {"off_policy"})):
        losses = chosen.losses(policy, batch, given, Noise(0))
        deviation = max(float(loss.maxima["ratio/max_abs_dev"].max()) for loss in losses)
        measured(deviation=deviation)
        alarms = Watch(WatchConfig(), 1e-4, 1e-15, ()).step({**QUIET, "ratio/max_abs_dev": deviation})
        assert set(alarms) == expected
        assert (deviation == 0) == (not expected)
