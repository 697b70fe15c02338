"""A run's updates on any number of ranks: each samples the whole batch on a net of its own, and learns its share."""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlalign.algorithms.regularise import weighed
from rlalign.checkpoint import Files
from rlalign.mdp.noise import Noise
from rlalign.models import analytic
from rlalign.models.lora import full
from rlalign.models.memory import MemoryConfig, fit
from rlalign.pipeline import Batch, deal, split
from rlalign.policy import Policy
from rlalign.types import Prompt, RewardScores, Scores, State, Trajectory, Unit
from rlalign.workers.group import Group, sum_gradients
from rlalign.workers.learner import Diverged, EmaConfig, Learner
from rlalign.workers.optimizer import OptimizerConfig
from rlalign.workers.sampler import Sampler
from tests import small
from tests.tiny import sd3_policy

SAMPLES = 4


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained, and how."""

    folder: Path | None = None  # of a tiny SD3; None: known velocities
    dims: int = 3  # of those
    lora: bool = False
    algorithm: str = "grpo"
    settings: dict[str, Any] = field(default_factory=dict[str, Any])  # of the algorithm
    groups: int = 3
    micro_batch: int = 3  # the tail of a share is padded
    lr: float = 1e-3
    eps: float = 1e-8
    updates: int = 1
    checkpointing: bool = False  # of the tiny SD3's activations
    dtype: torch.dtype = torch.float32  # of the tiny SD3


@dataclass(frozen=True, slots=True)
class Trained:
    gradients: list[dict[str, Tensor]]  # by optimizer step, as the optimizer saw them
    weights: dict[str, Tensor]
    metrics: list[dict[str, float]]


def train(group: Group, case: Case, steps: int = 2) -> Trained:
    return go_on(make(group, case), case, range(steps))


def make(group: Group, case: Case) -> Learner:
    chosen = small.algorithm(case.algorithm, **case.settings)
    config = OptimizerConfig(lr=case.lr, eps=case.eps)
    return Learner(_policy(case), chosen, Noise(0), config, EmaConfig(every=2), case.updates, group)


def go_on(learner: Learner, case: Case, steps: range) -> Trained:
    gradients: list[dict[str, Tensor]] = []
    make_step, seen = learner.optimizer.step, learner.policy.parameters

    def step() -> None:
        found = {key: p.grad for key, p in seen.items() if p.grad is not None}
        gradients.append({key: _whole(gradient).clone() for key, gradient in found.items()})
        make_step()

    learner.optimizer.step = step  # pyright: ignore[reportAttributeAccessIssue]
    metrics = [update(learner, case, number) for number in steps]
    learner.optimizer.step = make_step
    return Trained(gradients, {key: t.clone() for key, t in _weights(learner.policy, "policy").items()}, metrics)


def update(learner: Learner, case: Case, step: int) -> dict[str, float]:
    units, trajectories = sample(learner, case, step)
    rewards = torch.cat([t.final for t in trajectories]).flatten(1)[:, 0].reshape(case.groups, SAMPLES)
    valid = torch.ones_like(rewards, dtype=torch.bool)
    valid[0, 1] = False  # a reward failed
    texts = tuple(prompt.text for unit in units for prompt in unit.prompts)
    values = {"first": (rewards, 1.0), "doubter": (-rewards, 0.0)}  # the second one for gates
    scores = {name: RewardScores(value, valid, "train", weight) for name, (value, weight) in values.items()}
    advantages, _ = weighed(learner.algorithm, Scores(scores, texts))
    batch = Batch(step, units, trajectories, [])
    return learner.update(*deal(batch, advantages, valid, learner.group.size, case.updates)[learner.group.rank])


def sample(learner: Learner, case: Case, step: int) -> tuple[list[Unit], list[Trajectory]]:
    chosen = learner.algorithm
    sampler = Sampler(_policy(case), Noise(0), chosen.sample_with, chosen.needs.trajectory, shares=False)
    for name in dict.fromkeys(["policy", chosen.sample_with]):
        sampler.policy.load(name, _weights(learner.policy, name))
    sampler.version = step
    units = split(step, tuple(Prompt("abcdefg"[number]) for number in range(case.groups)), SAMPLES, case.micro_batch)
    return units, [sampler.sample(unit)[0] for unit in units]


HELD: dict[str, Learner] = {}


def hold(group: Group, case: Case, steps: int) -> None:
    """A learner that stays on its rank, after some steps."""
    HELD["it"] = make(group, case)
    go_on(HELD["it"], case, range(steps))


def save(group: Group, folder: Path) -> Files:
    return HELD["it"].save(folder)


def load(group: Group, case: Case, path: Path) -> State:
    """A fresh learner takes over the checkpoint; what it then holds, as whole tensors."""
    HELD["it"] = make(group, case)
    HELD["it"].load(path)
    return held(group)


def prolong(group: Group, case: Case, steps: range) -> Trained:
    return go_on(HELD["it"], case, steps)


def held(group: Group) -> State:
    state = HELD["it"].state_dict()
    return State({key: _whole(tensor) for key, tensor in state.tensors.items()}, state.values)


def drift(group: Group, case: Case) -> float:
    return HELD["it"].drift(sample(HELD["it"], case, 0)[1][:1])


def borrowed(group: Group) -> tuple[dict[str, Tensor], ...]:
    """The weights of the policy before, inside, and after a block that works with its average and fails."""
    policy = HELD["it"].policy
    before, average = _copy(_weights(policy, "policy")), _copy(_weights(policy, "ema"))
    inside: dict[str, Tensor] = {}
    try:
        with policy.using("ema"):
            inside = _copy(_weights(policy, "policy"))
            raise KeyError
    except KeyError:
        return before, inside, _copy(_weights(policy, "policy")), average, _copy(_weights(policy, "ema"))


def spoilt(group: Group, case: Case) -> tuple[str, bool]:
    """An update in which one row of rank 0 has no finite advantage."""
    learner = HELD["it"]
    before = _copy(_weights(learner.policy, "policy"))
    units, trajectories = sample(learner, case, 0)
    advantages = torch.ones(case.groups, SAMPLES)
    advantages[0, 0] = torch.nan
    batch = Batch(0, units, trajectories, [])
    try:
        learner.update(*deal(batch, advantages, torch.ones_like(advantages).bool(), group.size, 1)[group.rank])
    except Diverged as error:
        after = _weights(learner.policy, "policy")
        return str(error), all(torch.equal(after[key], before[key]) for key in before)
    raise AssertionError


def summed(group: Group) -> tuple[Any, ...]:
    """What the exchanges make of each rank's own values."""
    whole, half = torch.full((2, 3), 1.0 + group.rank), torch.full((5,), 0.5 + group.rank, dtype=torch.bfloat16)
    group.sum([whole, half])
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0 + group.rank])
    if group.rank:
        parameters[1].grad = torch.ones(2)
    sum_gradients(group, parameters)
    return whole, half, [p.grad for p in parameters], group.gather({"rank": group.rank})


def _copy(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in tensors.items()}


def _weights(policy: Policy, name: str) -> dict[str, Tensor]:
    return {key: _whole(tensor) for key, tensor in policy.weights(name).items()}


def _whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _policy(case: Case) -> Policy:
    if case.folder is None:
        means = [[0.0] * case.dims, [2.0] * case.dims]
        family = analytic.Family.load(analytic.Config(means=means), "", torch.float32, "cpu")
        settings = small.rollout_config(size=(1, case.dims), micro_batch=case.micro_batch)
        return Policy(family, settings, full(family.nets, ["velocity"]), lora=False)
    policy = deepcopy(_tiny(case.folder, case.lora, case.micro_batch, case.dtype))
    fit(policy.family, MemoryConfig(gradient_checkpointing=case.checkpointing), ["transformer"])
    return policy


@cache
def _tiny(folder: Path, lora: bool, micro_batch: int, dtype: torch.dtype) -> Policy:
    window = {"size": 2, "range": (0, 3)}
    return sd3_policy(folder, lora=lora, shake=0.02, dtype=dtype, micro_batch=micro_batch, window=window)
