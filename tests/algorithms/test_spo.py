"""SPO: candidates against a loop by hand, the loss and its gradient in closed form, and that rewards rise."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms.base import Loss
from rlalign.algorithms.losses import fixed_step
from rlalign.algorithms.spo import Algorithm, Config
from rlalign.config import load
from rlalign.evaluation.heldout import EvaluationConfig
from rlalign.mdp.noise import Noise
from rlalign.mdp.schedule import plain_sigmas
from rlalign.models import analytic
from rlalign.models.lora import full
from rlalign.pipeline import split
from rlalign.policy import Policy, RolloutConfig, draw_steps
from rlalign.types import Prompt, Trajectory, Unit
from rlalign.workers.sampler import Sampler
from tests.runs import run_file
from tests.tiny import sd3_folder, sd3_policy

from .chains import WEIGHT, make_policy, weight
from .preferences import gradient, rewards_while_training, rises, scores_of

GROUPS, CHAINS, STEPS, COUNT = 3, 2, 2, 4  # of a batch: rows are (group, chain, trained step, candidate)
ROWS = CHAINS * STEPS * COUNT
PROMPTS = tuple(Prompt(text) for text in "abc")
NOISE = Noise(0)


def settings(**changes: Any) -> RolloutConfig:
    values = {"prompts_per_step": GROUPS, "samples_per_prompt": ROWS, "num_steps": 5, "size": (1, 2), "micro_batch": 6}
    flow = {"kernel": "ddim", "noise_level": 0.8, "window": {"size": STEPS, "range": (0, 4)}, "candidates": COUNT}
    return RolloutConfig(**{**values, **flow, **changes})


def mixture(**changes: Any) -> Policy:
    """Float32, two components whose weights are what a prompt says; away from its reference."""
    weights = {"a": [1.0, 3.0], "b": [3.0, 1.0]}
    config = analytic.Config(means=[[0.0, 0.0], [2.0, 1.0]], prompt_weights=weights)
    family = analytic.Family.load(config, "", torch.float32, "cpu")
    policy = Policy(family, settings(**changes), full(family.nets, ["velocity"]), lora=False)
    with torch.no_grad():
        policy.parameters[WEIGHT].add_(0.1 * torch.randn(2, 3, generator=torch.Generator().manual_seed(0)))
    return policy


def sampled(policy: Policy, groups: tuple[int, ...] = (0, 1, 2), step: int = 5) -> Trajectory:
    unit = Unit(step, groups, tuple(PROMPTS[group] for group in groups), ROWS)
    return Sampler(policy, NOISE, "policy", keep_steps=True, shares=True).sample(unit)[0]


# --- candidates


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="two neighbours"),
        pytest.param({"guidance_scale": 2.5}, id="guided"),
        pytest.param({"window": None, "train_fraction": 0.5}, id="two of four stochastic steps"),
    ],
)
def test_candidates_are_those_of_a_loop_by_hand(changes: dict[str, Any]):
    policy = mixture(**changes)
    found, scale = sampled(policy), policy.settings.guidance_scale
    sigma = plain_sigmas(5, 3.0).tolist()

    def clean_and_noise(x: Tensor, k: int, prompt: Prompt) -> tuple[Tensor, Tensor]:
        cond, uncond = policy.family.encode([prompt])
        time = torch.tensor([1000 * sigma[k]])
        v = policy.family.predict(x[None], time, cond, policy.size)[0]
        if scale != 1:
            assert uncond is not None
            plain = policy.family.predict(x[None], time, uncond, policy.size)[0]
            v = plain + scale * (v - plain)
        return x - sigma[k] * v, x + (1 - sigma[k]) * v

    row = 0
    for group, prompt in enumerate(PROMPTS):
        stochastic, kept = (part.tolist() for part in draw_steps(policy.settings, True, NOISE, 5, group))
        for chain in range(CHAINS):
            head = torch.tensor([[5, group, chain * STEPS * COUNT]])
            x = NOISE.normal("rollout/initial", head, 0, policy.latent_shape)[0]
            for k in range(max(kept) + 1):
                x0, noise = clean_and_noise(x, k, prompt)
                now, nxt = sigma[k], sigma[k + 1]
                rho = (1 - now) * nxt / ((1 - nxt) * now)
                std = 0.8 * nxt * math.sqrt(1 - rho**2) if stochastic[k] else 0.0
                mean = (1 - nxt) * x0 + math.sqrt(nxt**2 - std**2) * noise
                if k not in kept:
                    x = mean + std * NOISE.normal("rollout/step", head, k, policy.latent_shape)[0]
                    continue
                drawn: list[Tensor] = []
                for _ in range(COUNT):
                    address = torch.tensor([[5, group, row % ROWS]])
                    drawn.append(mean + std * NOISE.normal("rollout/step", address, k, policy.latent_shape)[0])
                    density = torch.distributions.Normal(mean, std).log_prob(drawn[-1]).mean()
                    assert found.address[row].tolist() == address[0].tolist() and found.steps[row // COUNT] == k
                    assert torch.allclose(found.x[row, 0], x, atol=2e-5)
                    assert torch.allclose(found.x_next[row, 0], drawn[-1], atol=2e-5)
                    assert torch.allclose(found.log_probs[row, 0], density, atol=2e-4)
                    clean = clean_and_noise(drawn[-1], k + 1, prompt)[0]
                    assert torch.allclose(found.final[row], clean, atol=1e-4)
                    row += 1
                x = drawn[NOISE.integer("rollout/chosen", (5, group, (row - COUNT) % ROWS), COUNT)]
    assert row == found.num_rows == GROUPS * ROWS


def test_candidates_share_their_state_and_the_chain_goes_on_from_one_of_them():
    found = sampled(mixture())
    x, x_next = (part.reshape(GROUPS * CHAINS, STEPS, COUNT, 2) for part in (found.x, found.x_next))
    assert torch.equal(x, x[:, :, :1].expand_as(x))
    assert len(x_next.reshape(-1, 2).unique(dim=0)) == found.num_rows
    assert len(x[:, 0, 0].unique(dim=0)) == GROUPS * CHAINS
    gone_on = (x_next[:, 0] == x[:, 1]).all(-1)  # [chains, candidates], to the bit
    assert gone_on.sum(1).tolist() == [1] * (GROUPS * CHAINS)
    assert gone_on.any(0).sum() > 1  # not always the same one


def test_every_candidate_is_drawn_as_often():
    chosen = [NOISE.integer("rollout/chosen", (0, group, 0), COUNT) for group in range(4000)]
    counts = torch.tensor(chosen).bincount(minlength=COUNT)
    assert ((counts - 1000).square() / 1000).sum() < 16.3  # χ² with 3 degrees of freedom: p = 0.001


@pytest.mark.parametrize("changes", [{}, {"window": None, "samples_per_prompt": 32, "kernel": "flow_sde"}], ids=str)
def test_replay_equals_rollout_bit_for_bit(changes: dict[str, Any]):
    policy = mixture(**changes)
    samples = policy.settings.samples_per_prompt
    (unit, *_) = split(0, PROMPTS, samples, policy.settings.micro_batch)
    found, _ = Sampler(policy, NOISE, "policy", keep_steps=True, shares=True).sample(unit)
    for rows in torch.randperm(found.num_rows, generator=torch.Generator().manual_seed(0)).split(6):
        if len(rows) == 6:
            now, then = policy.log_probs(found.take(rows), 0)
            assert now.requires_grad and torch.equal(now.detach(), then)


def test_replay_of_a_transformer_equals_rollout_bit_for_bit(tmp_path: Path):
    flow = {"kernel": "ddim", "noise_level": 1.0, "window": {"size": 2, "range": (0, 3)}, "candidates": 4}
    policy = sd3_policy(
        sd3_folder(tmp_path / "sd3"), **flow, num_steps=4, samples_per_prompt=8, micro_batch=8, guidance_scale=3.0
    )
    found, pictures = Sampler(policy, NOISE, "policy", keep_steps=True, shares=True).sample(
        Unit(0, (0, 1), PROMPTS[:2], 8)
    )
    assert pictures.shape == (16, 3, 16, 16)
    for start in (0, 8):
        now, then = policy.log_probs(found.take(torch.arange(start, start + 8)), 0)
        assert torch.equal(now.detach(), then)
    algorithm = Algorithm(Config())
    advantages = algorithm.advantages(scores_of(found.final.flatten(1).sum(1).view(2, 8))).flatten()
    (loss,) = algorithm.losses(policy, found.take(torch.arange(16)), advantages, NOISE)
    assert (loss.maxima["ratio/max_abs_dev"] == 0).all()


def test_a_sample_does_not_depend_on_what_is_sampled_with_it():
    policy = mixture()
    whole = sampled(policy)
    for groups in ((0,), (1, 2), (2,)):
        rows = torch.tensor([group * ROWS + row for group in groups for row in range(ROWS)])
        part = sampled(policy, groups)
        expected = whole.take(rows)
        for name in ("x", "x_next", "log_probs", "final", "address"):
            assert torch.equal(getattr(part, name), getattr(expected, name)), name
        assert torch.equal(part.take(torch.arange(len(rows))).steps, expected.steps)


def test_means_are_found_again_from_the_noise_of_a_candidates_own_address():
    policy = mixture()
    found = sampled(policy)
    sample = found.take(torch.arange(found.num_rows))
    step = policy.replay(sample, 0)
    assert torch.allclose(policy.old_mean(sample, 0, step, NOISE), step.gaussian.mean, atol=1e-5)


def test_evaluation_has_no_candidates():
    unit = Unit(0, (0, 1), PROMPTS[:2], 3, "evaluation")
    plan = EvaluationConfig(num_steps=4)
    pictures: list[Tensor] = []
    for changes in ({}, {"candidates": None}):
        policy = mixture(**changes)
        sampler = Sampler(policy, NOISE, "policy", keep_steps=True, shares=True)
        trajectory, shown = sampler.sample(unit, plan.rollout(policy.settings), "policy")
        assert trajectory.num_rows == 6 and trajectory.num_kept == 0
        pictures.append(shown)
    assert torch.equal(*pictures)


# --- the loss, in float64


BETA, CLIP = 3.0, 0.03


def exact_policy(num_steps: int = 3, rows: int = 8, **changes: Any) -> Policy:
    """N(0, I) in two dimensions, all steps but the last with four candidates."""
    flow = {"kernel": "ddim", "noise_level": 1.0, "candidates": COUNT, "samples_per_prompt": rows, "micro_batch": 480}
    return make_policy(dim=2, num_steps=num_steps, **{**flow, **changes})


def exact_groups(policy: Policy, groups: int, seed: int) -> Trajectory:
    """Rows that are their own prompts, from starts in float64."""
    unit = Unit(seed, tuple(range(groups)), (Prompt(""),) * groups, policy.settings.samples_per_prompt)
    sampler = Sampler(policy, NOISE, "policy", keep_steps=True, shares=True)
    found, _ = sampler.sample(unit, initial=sampler.initial_noise(unit, policy.settings, keep=True).double())
    return found.take(torch.arange(found.num_rows))


def losses(policy: Policy, batch: Trajectory, advantages: Tensor, **config: Any) -> list[Loss]:
    return list(Algorithm(Config(**{"beta": BETA, **config})).losses(policy, batch, advantages, NOISE))


@pytest.fixture
def policy() -> Policy:
    """Away from its reference."""
    policy = exact_policy()
    with torch.no_grad():
        weight(policy)[:, :, -1] += 0.3
    return policy


@pytest.fixture
def batch(policy: Policy) -> Trajectory:
    return exact_groups(policy, 2, seed=0)


SCORES = torch.tensor([[3.0, 1.0, 2.0, 0.0, 0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 0.0, 4.0, 4.0, 4.2, 4.1]])
EXTREMES = [(0, 3), None, (10, 8), (14, 12)]  # rows of best and worst, state by state; the second one ties


def log_ratios(policy: Policy, batch: Trajectory) -> Tensor:
    """[b]: each row's own replay, as a difference of two densities."""
    with torch.no_grad():
        step, reference = policy.replay(batch, 0).gaussian, fixed_step(policy, "reference", batch, 0).gaussian
    x_next = batch.x_next[:, 0]
    return step.log_prob(x_next, "mean") - reference.log_prob(x_next, "mean")


@pytest.mark.parametrize("clip_range", [None, CLIP])
def test_every_state_is_a_preference_of_its_own(policy: Policy, batch: Trajectory, clip_range: float | None):
    rho = log_ratios(policy, batch)
    kept = rho if clip_range is None else rho.exp().clamp(1 - CLIP, 1 + CLIP).log()
    outside = ((rho.exp() - 1).abs() > CLIP).double()
    advantages = Algorithm(Config()).advantages(scores_of(SCORES)).flatten().double()
    (loss,) = losses(policy, batch, advantages, clip_range=clip_range)
    for state, pair in enumerate(EXTREMES):
        rows = slice(state * COUNT, (state + 1) * COUNT)
        h = BETA * (kept[pair[0]] - kept[pair[1]]) if pair else torch.tensor(0.0)
        expected = torch.log1p(torch.exp(-h)) if pair else 0.0
        assert loss.rows[rows].tolist() == pytest.approx([float(expected)] * COUNT)
        assert loss.means["margin"][rows].tolist() == pytest.approx([float(h)] * COUNT)
        assert (loss.means["accuracy"][rows] == (h > 0)).all()
        cut = float(outside[list(pair)].mean()) if pair and clip_range else 0.0
        assert (loss.means["clip_fraction"][rows] == cut).all()
    if clip_range:
        assert 0 < loss.means["clip_fraction"].mean() < 0.75


def test_pairs_that_are_too_close_teach_nothing(policy: Policy, batch: Trajectory):
    advantages = Algorithm(Config()).advantages(scores_of(SCORES)).flatten().double()
    for least, states in ((0.0, [0, 2, 3]), (0.5, [0, 2]), (2.0, [0]), (3.5, [])):
        (loss,) = losses(policy, batch, advantages, min_difference=least, clip_range=None)
        taught = (loss.rows > 0).view(-1, COUNT)
        assert taught.all(1).nonzero().flatten().tolist() == states and bool(taught.any()) == bool(states)
    assert (gradient(policy, losses(policy, batch, advantages, min_difference=3.5)) == 0).all()


def test_candidates_without_a_valid_reward_take_no_part(policy: Policy, batch: Trajectory):
    """The learner leaves them out: the best and the worst of the others make the pair."""
    advantages = Algorithm(Config()).advantages(scores_of(SCORES)).flatten().double()
    rows = torch.tensor([1, 2, 3, 4, 10, 12, 14, 15])  # without the first's best; one candidate alone teaches nothing
    (loss,) = losses(policy, batch.take(rows), advantages[rows], clip_range=None)
    (whole,) = losses(policy, batch, advantages, clip_range=None)
    rho = log_ratios(policy, batch)
    first = float(-(BETA * (rho[2] - rho[3])).sigmoid().log())
    last = float(whole.rows[12].detach())
    assert loss.rows.tolist() == pytest.approx([first, first, first, 0.0, 0.0, last, last, last])


def test_the_gradient_is_that_of_both_densities(policy: Policy, batch: Trajectory):
    """-β σ(-h) (∇ log π(x_w) - ∇ log π(x_l)), mean over states."""
    advantages = Algorithm(Config()).advantages(scores_of(SCORES)).flatten().double()
    found = gradient(policy, losses(policy, batch, advantages, clip_range=None))
    h = BETA * torch.stack([log_ratios(policy, batch)[list(pair)] for pair in EXTREMES if pair])
    slopes = -BETA * (h[:, 1] - h[:, 0]).sigmoid()
    pairs = [pair for pair in EXTREMES if pair]
    log_probs = policy.replay(batch, 0).gaussian.log_prob(batch.x_next[:, 0], "mean")
    total = sum(slope * (log_probs[one] - log_probs[two]) for slope, (one, two) in zip(slopes, pairs, strict=True))
    (expected,) = torch.autograd.grad(total / len(EXTREMES), policy.parameters[WEIGHT])  # pyright: ignore
    assert torch.allclose(found, expected, rtol=1e-10)


def test_a_state_costs_one_pass_and_one_of_the_reference(policy: Policy, batch: Trajectory):
    passed: list[int] = []
    handle = policy.family.nets["velocity"].register_forward_hook(lambda net, given, out: passed.append(len(given[0])))
    losses(policy, batch, torch.arange(16.0))
    handle.remove()
    assert passed == [4, 4]


@pytest.mark.parametrize("config", [{}, {"min_difference": 0.1}, {"clip_range": None, "beta": 1.0}], ids=str)
def test_rewards_rise_with_every_step_and_fall_with_flipped_marks(config: dict[str, Any]):
    def seen(sign: float) -> list[float]:
        policy = exact_policy()
        algorithm = Algorithm(Config(**config))
        return rewards_while_training(policy, algorithm, lambda step: exact_groups(policy, 60, step), 8, sign, lr=0.05)

    assert rises(seen(1.0))
    assert rises([-value for value in seen(-1.0)])


# --- settings


def test_settings_that_cannot_be(tmp_path: Path):
    for wrong in ({"clip_range": 1.0}, {"beta": 0.0}, {"min_difference": -1.0}):
        with pytest.raises(ValueError):
            Config(**wrong)
    run = run_file(tmp_path)
    assert load(run, ["algorithm=spo"]).rollout.candidates == 4
    for overrides, words in (
        (["rollout.samples_per_prompt=12"], "4 candidates in each of 2 trained steps make 8 samples of a chain"),
        (["rollout.window=null"], "4 candidates in each of 3 trained steps make 12 samples of a chain"),
        (["rollout.candidates=null"], "set rollout.candidates"),
    ):
        with pytest.raises(ValueError, match=words):
            load(run, ["algorithm=spo", *overrides])
    with pytest.raises(ValueError, match="compares finished samples; leave it out"):
        load(run, ["algorithm=grpo", "rollout.candidates=4"])


def test_rows_of_a_chain():
    plan = settings()
    assert (plan.num_kept, plan.chain_rows) == (2, 8)
    assert plan.model_copy(update={"candidates": None}).chain_rows == 1
    some = settings(window=None, train_fraction=0.5, samples_per_prompt=8)
    assert some.num_kept == len(draw_steps(some, True, NOISE, 0, 0)[1]) == 2
    assert some.chain_rows == 8
