"""What every algorithm in the folder must satisfy; a new one is found by its file and tested without an edit here."""

import inspect
import json
import math
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlalign import plugins
from rlalign.algorithms.base import Algorithm, Loss, Needs
from rlalign.mdp.noise import Noise
from rlalign.models.lora import LoraConfig
from rlalign.overlays import overlay, presets
from rlalign.policy import RolloutConfig
from rlalign.types import RewardScores, Scores, State, Trajectory
from rlalign.workers.learner import EmaConfig, Learner
from rlalign.workers.optimizer import OptimizerConfig
from rlalign.workers.sampler import Sampler
from tests import small

BLOCKS = {"rollout", "optimizer", "ema", "algorithm", "model"}
SIZE = {"size": (8, 8)}


@pytest.fixture(params=plugins.names("algorithm"))
def module(request: pytest.FixtureRequest) -> ModuleType:
    return plugins.load("algorithm", request.param)


@dataclass(frozen=True)
class Run:
    """One algorithm with everything around it, after a rollout."""

    algorithm: Algorithm
    sampler: Sampler
    learner: Learner
    trajectory: Trajectory  # of all rows, each its own prompt
    scores: Scores

    def rows(self, number: int) -> Tensor:
        """So many, or all of the groups that they belong to."""
        whole = -(-number // small.SAMPLES) * small.SAMPLES
        return torch.arange(whole if self.algorithm.needs.whole_groups else number)

    def parts(self) -> list[list[Tensor]]:
        """All rows in micro-batches of two other sizes."""
        return [
            list(torch.arange(24).split(size)) for size in ((12, 6) if self.algorithm.needs.whole_groups else (8, 3))
        ]

    def losses(self, rows: Tensor, advantages: Tensor) -> list[Loss]:
        sample = self.trajectory.take(rows)
        return list(self.algorithm.losses(self.learner.policy, sample, advantages[rows], Noise(0)))

    def gradient(self, micro_batches: list[Tensor], advantages: Tensor) -> dict[str, Tensor]:
        """As the learner makes it: sums over rows, divided by the planned number of rows."""
        parameters = self.learner.policy.parameters
        for rows in micro_batches:
            for loss in self.losses(rows, advantages):
                loss.rows.sum().div(sum(map(len, micro_batches))).backward()
        found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.grad = None
        return found


def start(module: ModuleType, **config: Any) -> Run:
    """Two rollouts, the second after an update: old, reference and policy are three different weights."""
    algorithm = module.Algorithm(module.Config(**config))
    sampler, learner = small.workers(algorithm)
    first = small.sample(sampler)
    learner.update(first, algorithm.advantages(small.scored(first)), version=0)
    trajectories = small.sample(sampler, step=1)
    whole = Trajectory.concat(trajectories)
    return Run(algorithm, sampler, learner, whole.take(torch.arange(whole.num_rows)), small.scored(trajectories))


@pytest.fixture
def run(module: ModuleType) -> Run:
    return start(module)


def test_the_module_says_what_it_is(module: ModuleType):
    config = module.Config()
    assert config.name == module.__name__.rsplit(".", 1)[1]
    assert config.updates_per_step >= 1
    assert "arXiv" in (module.__doc__ or "")
    assert all(field.description for field in module.Config.model_fields.values())
    with pytest.raises(ValidationError):
        module.Config(no_such_key=1)


def test_the_algorithm_declares_its_needs_and_can_be_built_twice(module: ModuleType):
    one, two = (module.Algorithm(module.Config()) for _ in range(2))
    assert isinstance(one.needs, Needs)
    assert one.sample_with in {"policy", "old", "ema"}
    assert one.sample_with != "old" or "old" in one.needs.copies
    assert one.state_dict() == two.state_dict()
    for name in ("advantages", "losses", "after_step", "state_dict", "load_state_dict"):
        assert inspect.signature(getattr(one, name)).parameters.keys() == (
            inspect.signature(getattr(Algorithm, name)).parameters.keys() - {"self"}
        )


def test_overlay_and_presets_are_settings_that_exist(module: ModuleType):
    assert set(module.OVERLAY) <= BLOCKS - {"algorithm", "model"}
    for steps in (3, 10, 50):  # a window leaves the last step out, so very short chains need one of their own
        RolloutConfig(**SIZE, num_steps=steps, **module.OVERLAY.get("rollout", {}))
    OptimizerConfig(**module.OVERLAY.get("optimizer", {}))
    for preset in getattr(module, "PRESETS", {}).values():
        assert set(preset) <= BLOCKS
        assert preset["algorithm"]["name"] == module.Config().name
        module.Config(**preset["algorithm"])
        RolloutConfig(**SIZE | preset.get("rollout", {}))
        OptimizerConfig(**preset.get("optimizer", {}))
        if preset.get("ema") is not None:
            EmaConfig(**preset["ema"])
        if preset.get("model", {}).get("lora") is not None:
            LoraConfig(**preset["model"]["lora"])


def test_presets_are_plain_data(module: ModuleType):
    for preset in [module.OVERLAY, *getattr(module, "PRESETS", {}).values()]:
        json.dumps(preset)


METHODS = [name for name, (_, preset) in presets().items() if "size" not in preset.get("rollout", {})]


@pytest.mark.parametrize("name", METHODS)
def test_a_papers_preset_trains(name: str):
    """Two steps with the rollout that it brings along. Presets with a size are of one model, and only read above."""
    brought, module = overlay(name)
    algorithm = module.Algorithm(module.Config(**presets()[name][1]["algorithm"]))
    settings = small.rollout_config(**{"window": None, **brought.get("rollout", {})})
    sampler, learner = small.workers(algorithm, settings)
    before = {key: parameter.detach().clone() for key, parameter in learner.policy.parameters.items()}
    for step in range(2):
        trajectories = small.sample(sampler, step)
        metrics = learner.update(trajectories, algorithm.advantages(small.scored(trajectories)), version=step)
        assert metrics["grad_norm"] > 0 and all(math.isfinite(value) for value in metrics.values())
        now = {key: parameter.detach().clone() for key, parameter in learner.policy.parameters.items()}
        assert any(not torch.equal(now[key], before[key]) for key in now)
        before = now


def test_papers_presets_are_found_and_those_of_models_are_not_among_them():
    assert {"flow_grpo_fast", "dance_grpo", "mix_grpo", "reinforce", "pepg", "par", "ipo", "draft_lv"} <= {*METHODS}
    assert not {"flow_grpo_sd35", "nft_sd35", "ddpo_sd15"} & {*METHODS}


def test_names_of_presets_are_unique_over_the_folder():
    modules = [plugins.load("algorithm", name) for name in plugins.names("algorithm")]
    names = [name for module in modules for name in getattr(module, "PRESETS", {})]
    assert len(names) == len(set(names))


def test_advantages_have_the_shape_of_the_scores_and_no_nan(run: Run):
    advantages = run.algorithm.advantages(run.scores)
    assert advantages.shape == run.scores.total.shape
    assert advantages.dtype == torch.float32
    assert (advantages != 0).any()


def test_invalid_rewards_have_advantage_zero_and_never_leak(module: ModuleType, run: Run):
    reward = run.scores.rewards["first"]
    valid = reward.valid.clone()
    valid[0, 1], valid[2] = False, False
    values = torch.where(valid, reward.values, torch.nan)
    broken = Scores({"first": RewardScores(values, valid, "train", 1.0)}, run.scores.prompts)
    advantages = module.Algorithm(module.Config()).advantages(broken)
    assert advantages.isfinite().all()
    assert (advantages[~valid] == 0).all()


def test_monitors_never_touch_advantages(module: ModuleType, run: Run):
    watched = RewardScores(torch.randn_like(run.scores.total), run.scores.valid, "monitor", 5.0)
    more = replace(run.scores, rewards={**run.scores.rewards, "watched": watched})
    one, two = (module.Algorithm(module.Config()).advantages(scores) for scores in (run.scores, more))
    assert torch.equal(one, two)


def test_losses_are_rows_with_a_graph_and_metrics_without(run: Run):
    rows = run.rows(8)
    losses = run.losses(rows, run.algorithm.advantages(run.scores).flatten())
    assert losses
    for loss in losses:
        assert loss.rows.shape == rows.shape
        assert loss.rows.requires_grad
        assert "policy_loss" in loss.means
        for metric in [*loss.means.values(), *loss.maxima.values()]:
            assert metric.shape == rows.shape
            assert metric.isfinite().all()
            assert not metric.requires_grad


def test_there_is_a_gradient_and_the_weights_stay_where_they_are(run: Run):
    policy = run.learner.policy
    before = {name: {key: t.clone() for key, t in policy.weights(name).items()} for name in ("policy", *policy.copies)}
    gradient = run.gradient([torch.arange(24)], run.algorithm.advantages(run.scores).flatten())
    assert all(part.isfinite().all() for part in gradient.values())
    assert any((part != 0).any() for part in gradient.values())
    for name, tensors in before.items():
        assert all(torch.equal(policy.weights(name)[key], tensor) for key, tensor in tensors.items())


def test_the_gradient_does_not_depend_on_the_micro_batches(run: Run):
    advantages, rows = run.algorithm.advantages(run.scores).flatten(), torch.arange(24)
    whole = run.gradient([rows], advantages)
    for micro_batches in run.parts():
        parts = run.gradient(micro_batches, advantages)
        for name, expected in whole.items():
            assert torch.allclose(parts[name], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_loss_is_a_mean_over_what_is_yielded(run: Run):
    """policy_loss is the logged value of a step or time; rows carry their share of the mean."""
    losses = run.losses(run.rows(8), run.algorithm.advantages(run.scores).flatten())
    plain = torch.stack([loss.rows.detach() * len(losses) for loss in losses])
    logged = torch.stack([loss.means["policy_loss"] for loss in losses])
    config = run.algorithm.config  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("kl", "teacher"):
        penalty = torch.stack([loss.means.get(name, torch.zeros_like(loss.rows)) for loss in losses])
        logged = logged + getattr(config, f"{name}_weight", 0.0) * penalty
    assert torch.allclose(plain, logged, rtol=1e-4, atol=1e-5)


def test_losses_are_stateless_and_repeat_to_the_last_bit(run: Run):
    advantages, rows = run.algorithm.advantages(run.scores).flatten(), run.rows(8)
    state = run.algorithm.state_dict()
    one, two = (run.gradient([rows], advantages) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert run.algorithm.state_dict() == state


def test_silent_rows_are_silent(run: Run):
    if not run.algorithm.needs.silent_zero:
        pytest.skip("makes no such promise")
    free = replace(run, trajectory=replace(run.trajectory, held=torch.zeros(24)))  # no penalty holds them
    gradient = free.gradient([run.rows(8)], torch.zeros(24))
    assert all((part == 0).all() for part in gradient.values())


def test_the_ratio_is_exactly_one_on_fresh_samples(run: Run):
    losses = run.losses(run.rows(8), run.algorithm.advantages(run.scores).flatten())
    if not run.algorithm.needs.trajectory or "ratio/mean" not in losses[0].means:
        pytest.skip("has no ratio")
    for loss in losses:
        assert (loss.maxima["ratio/max_abs_dev"] == 0).all()
        assert (loss.means["ratio/mean"] == 1).all()


def test_the_step_ends_in_numbers(run: Run):
    metrics = run.algorithm.after_step(run.learner.policy, run.learner.updates)
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_state_survives_json_and_goes_on_alike(module: ModuleType, run: Run):
    run.algorithm.advantages(run.scores)
    state = run.algorithm.state_dict()
    again = module.Algorithm(module.Config())
    again.load_state_dict(State(state.tensors, json.loads(json.dumps(state.values))))
    assert torch.equal(again.advantages(run.scores), run.algorithm.advantages(run.scores))


def test_it_learns(module: ModuleType):
    """Twenty updates on a trivial reward: the first number of a sample grows."""
    algorithm = module.Algorithm(module.Config())
    sampler, learner = small.workers(algorithm, lr=3e-2)
    means: list[float] = []
    for step in range(20):
        trajectories = small.sample(sampler, step)
        scores = small.scored(trajectories)
        learner.update(trajectories, algorithm.advantages(scores), version=step)
        means.append(scores.total.mean().item())
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.3
