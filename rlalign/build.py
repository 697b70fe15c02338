"""From a RunConfig to the parts that the loop moves data between."""

from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlalign import plugins
from rlalign.algorithms.base import Algorithm, epochs_of
from rlalign.config import RunConfig, resolve
from rlalign.loop import LoopSettings, Parts
from rlalign.mdp.noise import Noise
from rlalign.models import lora
from rlalign.models.base import Family, torch_dtype
from rlalign.models.embeddings import Embeddings, identity
from rlalign.models.memory import fit, placed
from rlalign.paths import model_path
from rlalign.policy import Policy, Variant
from rlalign.prompts import read
from rlalign.runfile import Tree
from rlalign.runtime.local import LocalPool, LocalRuntime
from rlalign.runtime.pool import Pool, Runtime
from rlalign.runtime.turns import taking_turns
from rlalign.runtime.weights import ObjectStore, Publisher
from rlalign.scoring import load_rewards
from rlalign.scoring.gradients import reward_sum
from rlalign.types import Size
from rlalign.workers.group import Group
from rlalign.workers.learner import Learner
from rlalign.workers.sampler import Sampler
from rlalign.workers.scorer import Scorer


def build(config: RunConfig) -> tuple[Parts, LoopSettings]:
    """Everything loaded and in place; ValueError, one sentence, when the user has to change something."""
    size = Size(*config.rollout.size)
    prompts, heldout = read(config.prompts, "train", size), read(config.prompts, "heldout", size)
    if config.rollout.source == "data":
        prompts = prompts.recorded(config.rollout.samples_per_prompt)
        prompts.require_images()
    algorithm = make_algorithm(config)
    pools, runtime = _in_this_process(config, algorithm) if config.runtime.kind == "local" else _on_ray(config)
    parts = Parts(*pools, make_publisher(config, algorithm), algorithm, prompts, heldout, runtime)
    return parts, loop_settings(config)


def _in_this_process(config: RunConfig, algorithm: Algorithm) -> tuple[tuple[Pool, Pool, Pool], Runtime]:
    threads = config.runtime.threads_per_worker
    torch.set_num_threads(threads)
    scorers = [make_scorer(config) for _ in range(config.runtime.scorers)]
    policy = load_policy(config)
    samplers, learner = make_samplers(config, policy, algorithm), make_learner(config, policy, algorithm)
    pools = (
        LocalPool("sampler", samplers, threads),
        LocalPool("scorer", scorers, threads),
        LocalPool("learner", [learner], threads),
    )
    return pools, LocalRuntime(pools)


def _on_ray(config: RunConfig) -> tuple[tuple[Pool, Pool, Pool], Runtime]:
    """The same workers, each built from the config in a process of its own."""
    from rlalign.runtime.cluster import RayRuntime

    wanted = config.runtime
    runtime = RayRuntime(wanted, config.seed)
    tree = movable(config.tree(), Path.cwd()) if runtime.uploaded else config.tree()
    runtime.keep_spares(partial(warm_up, tree))
    try:
        learners = runtime.group("learner", partial(learner_from, tree), wanted.learners, Group.address)
        samplers = runtime.pool("sampler", partial(sampler_from, tree), wanted.samplers)
        scorers = runtime.pool("scorer", partial(scorer_from, tree), wanted.scorers, wanted.scorer_memory_gib)
        runtime.wait_until_up()
    except BaseException:
        runtime.close()
        raise
    if wanted.offload_idle:
        samplers, learners = taking_turns(samplers, learners)
    return (samplers, scorers, learners), runtime


def movable(tree: Any, home: Path) -> Any:
    """The tree with paths inside of ``home`` relative to it, as a worker finds them in its own copy of that folder."""
    if isinstance(tree, dict):
        return {key: movable(value, home) for key, value in tree.items()}
    if isinstance(tree, list):
        return [movable(value, home) for value in tree]
    return tree.removeprefix(f"{home}/") if isinstance(tree, str) else tree


def warm_up(tree: Tree) -> None:
    """In a process that waits to become a worker: imports this module, and then the code of the run's own parts."""
    config = resolve(tree, Path(), "config.yaml")
    plugins.load("model", config.model.family)


def sampler_from(tree: Tree) -> Sampler:
    config = resolve(tree, Path(), "config.yaml")
    policy = load_policy(config, config.runtime.offload_idle)
    sampler = make_sampler(config, policy, make_algorithm(config), shared=False)
    if config.runtime.offload_idle:
        sampler.rest()
    return sampler


def scorer_from(tree: Tree) -> Scorer:
    return Scorer(resolve(tree, Path(), "config.yaml").rewards, replaceable=True)


def learner_from(tree: Tree, rank: int, size: int, address: str) -> Learner:
    config = resolve(tree, Path(), "config.yaml")
    group = Group.join(address, rank, size, device_of(config)) if size > 1 else None
    policy = load_policy(config, config.runtime.offload_idle)
    learner = make_learner(config, policy, make_algorithm(config), group)
    if config.runtime.offload_idle:
        learner.rest()
    return learner


def make_learner(config: RunConfig, policy: Policy, algorithm: Algorithm, group: Group | None = None) -> Learner:
    noise, updates = Noise(config.seed), config.updates_per_step
    if algorithm.needs.reward_gradient:
        vars(algorithm)["reward"] = reward_sum(
            load_rewards([reward for reward in config.rewards if reward.role == "train"])
        )
    return Learner(policy, algorithm, noise, config.optimizer, config.ema, updates, group, epochs_of(config.algorithm))


def loop_settings(config: RunConfig) -> LoopSettings:
    return LoopSettings(
        steps=config.steps,
        seed=config.seed,
        max_staleness=config.runtime.max_staleness,
        rollout=config.rollout,
        evaluation=config.evaluation,
        updates_per_step=config.updates_per_step,
    )


def make_publisher(config: RunConfig, algorithm: Algorithm) -> Publisher:
    """For the weights that samplers need: those that sample, and those that are judged."""
    needed: list[Variant] = [algorithm.sample_with, config.evaluation.weights]
    names, runtime = [*dict.fromkeys(needed)], config.runtime
    if runtime.kind == "ray" and runtime.transport == "collective":
        from rlalign.runtime.collective import Collective

        own: Any = Collective(names, runtime.max_staleness, runtime.canary_every)  # Ray's pools have what it needs
        return own
    joins = runtime.kind == "ray"
    return ObjectStore(names, runtime.max_staleness, runtime.canary_every, shares(config), joins)


def shares(config: RunConfig) -> bool:
    """A single sampler that works only while the learner waits uses the learner's own net."""
    return config.runtime.kind == "local" and config.runtime.samplers == 1 and config.runtime.max_staleness == 0


def make_algorithm(config: RunConfig) -> Algorithm:
    return config.algorithm_module.Algorithm(config.algorithm)


def make_scorer(config: RunConfig) -> Scorer:
    return Scorer(config.rewards)


def load_policy(config: RunConfig, resting: bool = False) -> Policy:
    """The model with what trains attached, as it is before the first update; ``resting``: in CPU memory for now."""
    memory, device = config.model.memory, device_of(config)
    family = load_family(config, torch.device("cpu") if memory.offload or resting else device)
    names = config.model.train or [next(iter(family.nets))]
    fit(family, memory, names)
    offloaded, embeddings = placed(family, memory.offload, device, resting), _embeddings(config, family)
    parameters = _trainable(config, family, names)
    try:
        policy = Policy(family, config.rollout, parameters, config.model.lora is not None, offloaded, embeddings)
    except ValueError as error:
        raise ValueError(f"rollout: {error}") from error
    if resting:
        policy.device = device  # where it will compute
    return policy


def _embeddings(config: RunConfig, family: Family) -> Embeddings | None:
    """Before anything is attached to the nets."""
    memory = config.model.memory
    if memory.embeddings is None:
        return None
    told = config.model.model_dump(mode="json", exclude={"path", "lora", "train", "memory"})
    told["memory"] = memory.model_dump(include={"vae_tiling", "vae_slicing", "attention"})
    return Embeddings(memory.embeddings, identity(family, told, device_of(config)))


def _trainable(config: RunConfig, family: Family, names: list[str]) -> dict[str, nn.Parameter]:
    if config.model.lora is None:
        return lora.full(family.nets, names)
    try:
        return lora.attach(family.nets, names, config.model.lora, family.lora_targets, config.seed)
    except ValueError as error:  # peft's own: no layer is called like that
        raise ValueError(f"model.lora: {error}") from error


def load_family(config: RunConfig, device: torch.device) -> Family:
    """The untrained model."""
    module, dtype = plugins.load("model", config.model.family), torch_dtype(config.model.dtype)
    return module.Family.load(config.model, model_path(config.model.path), dtype, device)


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
    alone = shares(config)
    policies = [policy] if alone else [twin(policy) for _ in range(config.runtime.samplers)]
    return [make_sampler(config, own, algorithm, alone) for own in policies]


def make_sampler(config: RunConfig, policy: Policy, algorithm: Algorithm, shared: bool) -> Sampler:
    needs = algorithm.needs
    return Sampler(policy, Noise(config.seed), algorithm.sample_with, needs.trajectory, shared, needs.uncond)


def twin(policy: Policy) -> Policy:
    """A policy that trains and samples on its own; weights that never change are shared."""
    nets = [*policy.family.nets.values()]
    frozen: list[Tensor] = [p for p in chain.from_iterable(net.parameters() for net in nets) if not p.requires_grad]
    return deepcopy(policy, {id(tensor): tensor for tensor in frozen})
