"""T13: old samples. With the ratio to the weights that sampled, a lag does not move the fixed point.

The lag is that of a run: its own loop, pipeline, workers and AdamW, from a run file with ``runtime.max_staleness``, on
the chain of the other rungs. Rewards are read from pictures, whose 256 grey values are no bias.

Samplers that lag by some versions only delay: as steps shrink, old and new weights agree. A bias that lasts needs
samples that never become new, so the twin is the sampler that gets no new weights (EXACT_TESTS 7), in the loop of
training.py. With samples of the reference alone:

    with ρ         u*, exactly: a linear reward sees a control through the mean of y_{k+1} alone
    without it     a_k = -g_k b_k v_k / (β s_k²),   b_k (β - (g_k v_k)² / (β s_k²)) = c_k² g_{k+1}

in one dimension, g_k = q G_k the gain from y_k to the reward, s_k² = E y_k², v_k = Var(y_k | what the baseline knows).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.algorithms.regularise import weighed
from rlalign.build import build
from rlalign.config import resolve
from rlalign.loop import Parts
from rlalign.loop import train as run_loop
from rlalign.mdp.schedule import plain_sigmas
from rlalign.pipeline import split
from rlalign.reporting.recorder import Recorder
from rlalign.reporting.watch import Watch, WatchConfig
from rlalign.rundir import open_run
from rlalign.types import Scores
from tests.algorithms.chains import SHIFT, weight

from .conftest import Proof
from .riccati import Controls, evaluate
from .test_linear import BETA, GROUP, TOLERANCE, Problem, algorithm, flow, problem, trained, worst
from .training import Budget, as_controls, slopes

# starts of their own: the baseline knows nothing, and v_k = s_k²
APART = Budget(steps=40, groups=1500, samples=GROUP, shared=False, first=0.9, burn_in=0.5)
STRONG = 1.5  # little noise a step and this penalty: a large bias, and no ratio above 2, the widest clip range
STEPS = 180

REWARD = """
from rlalign.models.analytic import numbers

def number(images, prompts):
    return numbers(images)[:, 0]
"""


class Silent:
    def evaluated(self, step: int, metrics: Any) -> None: ...

    def row(self, row: Any) -> None: ...


def tree(seed: int, staleness: int, beta: float = BETA, steps: int = STEPS, prompts: int = 32) -> dict[str, Any]:
    """The run file of the problem ``flow()``; the learning rate is large, and what is compared a mean over steps."""
    knots = plain_sigmas(4, SHIFT)[:-1].tolist()
    kernel = {"kernel": "flow_sde", "noise_level": 0.7, "logprob_reduction": "sum", "init_noise": "shared"}
    images = {"prompts_per_step": prompts, "samples_per_prompt": 16, "micro_batch": 16 * prompts}
    loss = {"advantage": "loo", "adv_clip": 1e9, "clip_range": 1.0, "kl_weight": beta}
    return {
        "model": {"family": "analytic", "means": [[0.0]], "lora": None, "knots": knots, "shift": SHIFT},
        "prompts": {"train": "train.txt", "heldout": "heldout.txt"},
        "rollout": {**images, **kernel, "num_steps": 4, "size": [1, 1], "window": None},
        "rewards": [{"use": "reward.py:number"}],
        "algorithm": {"name": "grpo", **loss},
        "optimizer": {"lr": 3e-2, "weight_decay": 0.0, "max_grad_norm": 1e9, "betas": [0.5, 0.9]},
        "evaluation": {"every": 0, "num_images": 8},
        "checkpoint": {"every": 10**6},
        "reporting": {"tensorboard": False},
        "runtime": {"max_staleness": staleness},
        "ema": None,
        "seed": seed,
        "steps": steps,
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "train.txt").write_text("\n".join(f"prompt {i}" for i in range(64)))
    (tmp_path / "heldout.txt").write_text("another prompt")
    return tmp_path


def weights_of(parts: Parts) -> Tensor:
    """[D, N, D + 1] of the learner."""
    (learner,) = parts.learners.workers  # pyright: ignore[reportAttributeAccessIssue]
    return weight(learner.policy).detach().clone()


def ran(place: Path, **settings: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """Weights after every step of a run [steps, D, N, D + 1], and its rows."""
    config = resolve(tree(**settings), place, "test")
    parts, loop = build(config)
    path: list[Tensor] = []

    def after_a_step() -> bool:
        path.append(weights_of(parts))
        return False

    folder = place / "_".join(str(value) for value in settings.values())
    with open_run(folder, config.tree(), config.hashed()) as current:
        recorder = Recorder(
            current, config.steps, config.checkpoint, Watch(WatchConfig(), None, 1e-15, ()), [], Silent()
        )
        run_loop(parts, loop, recorder, after_a_step)
        recorder.close()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.stack(path), rows


def rest_of(path: Tensor) -> Controls:
    return as_controls(path[len(path) // 2 :].double().mean(0), slopes(flow().policy))


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_a_lagging_sampler_has_the_same_fixed_point(
    place: Path, staleness: int, seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    at = flow()
    for seed in seeds:
        path, rows = ran(place, seed=seed, staleness=staleness)
        off = at.off(rest_of(path))
        measured(distance=off)
        proves("grpo", "T13", f"max_staleness {staleness}", "distance to the optimum", off, "below 3 %", percent=True)
        assert [row["staleness"] for row in rows] == [min(step, staleness) for step in range(STEPS)]
        assert off < TOLERANCE


def test_a_run_with_another_weight_rests_elsewhere(place: Path, measured: Callable[..., None]):
    off = flow().off(rest_of(ran(place, seed=0, staleness=1, beta=1.3 * BETA, steps=60)[0]))
    measured(distance=off)
    assert off > 5 * TOLERANCE


def test_no_delay_is_the_synchronous_run_to_the_last_bit(place: Path):
    """Against the loop written out: sample, score, update, and again."""
    few = {"seed": 3, "steps": 5, "prompts": 8}
    queued, _ = ran(place, staleness=0, **few)
    late, _ = ran(place, staleness=1, **few)
    assert torch.equal(queued, synchronous(place, **few))
    assert not torch.equal(queued, late)


def synchronous(place: Path, seed: int, steps: int, prompts: int) -> Tensor:
    parts, loop = build(resolve(tree(seed, 0, steps=steps, prompts=prompts), place, "test"))
    sampler, scorer, learner = (pool.workers[0] for pool in parts.pools)  # pyright: ignore[reportAttributeAccessIssue]
    parts.publisher.publish(parts.learners, parts.samplers, version=0)
    path: list[Tensor] = []
    for step in range(steps):
        asked = parts.prompts.at(seed, step, prompts)
        units = split(step, asked, loop.rollout.samples_per_prompt, loop.rollout.micro_batch)
        made = [sampler.sample(unit) for unit in units]
        scored = [scorer.score(images, unit, ("train",)) for unit, (_, images) in zip(units, made, strict=True)]
        scores = Scores.concat(scored)
        advantages, _ = weighed(parts.algorithm, scores)
        learner.update([trajectory for trajectory, _ in made], advantages, step, scores.valid)
        parts.publisher.publish(parts.learners, parts.samplers, version=step + 1)
        path.append(weights_of(parts))
    return torch.stack(path)


# --- samplers without new weights


def quiet() -> Problem:
    return problem(1, 4, "flow_sde", 0.3, STRONG)


def biased(at: Problem, beta: float) -> Controls:
    """Where ratios of 1 on samples of the reference come to rest."""
    still = Controls(torch.zeros_like(at.optimum.a), torch.zeros_like(at.optimum.b))
    moments = evaluate(at.chain, still, at.reward, *at.start).second_moments
    a, b, gain = torch.zeros_like(still.a), torch.zeros_like(still.b), at.reward.q
    for k in reversed(range(len(b))):
        after, gain = gain, gain * at.chain.F[k, 0, 0]
        if at.chain.c[k] == 0:
            continue
        s2 = moments[k, 0, 0]
        b[k] = at.chain.c[k] ** 2 * after / (beta - (gain * s2) ** 2 / (beta * s2))
        a[k] = -gain * b[k] / beta
    return Controls(a, b)


def test_a_sampler_that_never_learns_is_corrected_by_the_ratio(
    seeds: tuple[int, ...], measured: Callable[..., None], proves: Proof
):
    at, chosen = quiet(), algorithm(kl_weight=STRONG)
    runs = trained(quiet, chosen, seeds, APART, beta=STRONG, frozen=True)
    measured(distance=worst(at, runs))
    for run in runs:
        off = at.off(run.controls)
        proves(
            "grpo", "T13", "samples of the base model alone", "distance to the optimum", off, "below 3 %", percent=True
        )
    assert worst(at, runs) < TOLERANCE


def test_without_the_ratio_it_comes_to_rest_elsewhere(seeds: tuple[int, ...], measured: Callable[..., None]):
    at, chosen = quiet(), algorithm(kl_weight=STRONG)
    expected = biased(at, STRONG)
    runs = trained(quiet, chosen, seeds, APART, beta=STRONG, frozen=True, corrected=False)
    measured(distance=worst(at, runs), own=worst(at, runs, expected), apart=at.off(expected))
    assert min(at.off(run.controls) for run in runs) > 0.15
    assert worst(at, runs, expected) < TOLERANCE
