"""From a RunConfig to the parts that the loop moves data between."""

from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn

from rlalign import plugins
from rlalign.algorithms.base import Algorithm
from rlalign.config import RunConfig
from rlalign.loop import LoopSettings, Parts
from rlalign.mdp.noise import Noise
from rlalign.models import lora
from rlalign.models.base import Family, torch_dtype
from rlalign.paths import model_path
from rlalign.policy import Policy, Variant
from rlalign.prompts import PromptSet
from rlalign.runtime.local import LocalPool
from rlalign.workers.learner import Learner
from rlalign.workers.sampler import Sampler
from rlalign.workers.scorer import Scorer


def build(config: RunConfig) -> tuple[Parts, LoopSettings]:
    """Everything loaded and in place; ValueError, one sentence, when the user has to change something."""
    torch.set_num_threads(config.runtime.threads_per_worker)
    prompts, heldout = PromptSet.read(config.prompts.train), PromptSet.read(config.prompts.heldout)
    scorers = [make_scorer(config) for _ in range(config.runtime.scorers)]
    algorithm = make_algorithm(config)
    policy = load_policy(config)
    samplers = make_samplers(config, policy, algorithm)
    learner = Learner(
        policy, algorithm, Noise(config.seed), config.optimizer, config.ema, updates_per_step=config.updates_per_step
    )
    threads = config.runtime.threads_per_worker
    parts = Parts(
        samplers=LocalPool("sampler", samplers, threads),
        scorers=LocalPool("scorer", scorers, threads),
        learners=LocalPool("learner", [learner], threads),
        algorithm=algorithm,
        prompts=prompts,
        heldout=heldout,
    )
    return parts, loop_settings(config, algorithm)


def loop_settings(config: RunConfig, algorithm: Algorithm) -> LoopSettings:
    needed: list[Variant] = [algorithm.sample_with, config.evaluation.weights]
    return LoopSettings(
        steps=config.steps,
        seed=config.seed,
        max_staleness=config.runtime.max_staleness,
        rollout=config.rollout,
        evaluation=config.evaluation,
        publish=tuple(dict.fromkeys(needed)),
    )


def make_algorithm(config: RunConfig) -> Algorithm:
    return config.algorithm_module.Algorithm(config.algorithm)


def make_scorer(config: RunConfig) -> Scorer:
    return Scorer(config.rewards)


def load_policy(config: RunConfig) -> Policy:
    """The model with what trains attached, as it is before the first update."""
    family = load_family(config)
    names = config.model.train or [next(iter(family.nets))]
    parameters = _trainable(config, family, names)
    try:
        return Policy(family, config.rollout, parameters, lora=config.model.lora is not None)
    except ValueError as error:
        raise ValueError(f"rollout: {error}") from error


def _trainable(config: RunConfig, family: Family, names: list[str]) -> dict[str, nn.Parameter]:
    if config.model.lora is None:
        return lora.full(family.nets, names)
    try:
        return lora.attach(family.nets, names, config.model.lora, family.lora_targets, config.seed)
    except ValueError as error:  # peft's own: no layer is called like that
        raise ValueError(f"model.lora: {error}") from error


def load_family(config: RunConfig) -> Family:
    """The untrained model, where it is to run."""
    module, dtype = plugins.load("model", config.model.family), torch_dtype(config.model.dtype)
    return module.Family.load(config.model, model_path(config.model.path), dtype, device_of(config))


def device_of(config: RunConfig) -> torch.device:
    """The device that was asked for, if it is there."""
    wanted = config.runtime.device
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[device.type] or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"runtime.device is {wanted}, but there is no such device; set it to auto or cpu")
    return device


def make_samplers(config: RunConfig, policy: Policy, algorithm: Algorithm) -> list[Sampler]:
    """A single sampler that works only while the learner waits uses the learner's own net."""
    runtime, keep = config.runtime, algorithm.needs.trajectory
    shares = runtime.samplers == 1 and runtime.max_staleness == 0
    policies = [policy] if shares else [twin(policy) for _ in range(runtime.samplers)]
    return [Sampler(own, Noise(config.seed), algorithm.sample_with, keep, shares) for own in policies]


def twin(policy: Policy) -> Policy:
    """A policy that trains and samples on its own; weights that never change are shared."""
    nets = [*policy.family.nets.values()]
    frozen: list[Tensor] = [p for p in chain.from_iterable(net.parameters() for net in nets) if not p.requires_grad]
    return deepcopy(policy, {id(tensor): tensor for tensor in frozen})
