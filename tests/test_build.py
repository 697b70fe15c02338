"""From a RunConfig to parts: who shares a network with whom, and what is published to them."""

from pathlib import Path

import pytest
import torch

from rlalign.build import build, device_of, learner_from, load_policy, movable, sampler_from, twin
from rlalign.config import RunConfig, load, resolve
from rlalign.loop import Parts
from rlalign.workers.learner import Learner
from rlalign.workers.sampler import Sampler
from tests.runs import run_file


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_file(tmp_path)


def workers(parts: Parts) -> tuple[list[Sampler], Learner]:
    (learner,) = parts.learners.workers  # pyright: ignore[reportAttributeAccessIssue]  # a LocalPool
    return parts.samplers.workers, learner  # pyright: ignore[reportAttributeAccessIssue]


def built(run: Path, *overrides: str) -> tuple[list[Sampler], Learner, tuple[str, ...]]:
    parts, _ = build(load(run, overrides))
    return *workers(parts), tuple(parts.publisher.names)


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
def test_one_sampler_uses_the_learners_network(run: Path, algorithm: str):
    (sampler,), learner, _ = built(run, f"algorithm={algorithm}")
    assert sampler.shares and sampler.policy is learner.policy


@pytest.mark.parametrize("why", ["runtime.samplers=2", "runtime.max_staleness=1"])
def test_others_have_networks_of_their_own(run: Path, why: str):
    samplers, learner, _ = built(run, why)
    policies = [sampler.policy for sampler in samplers]
    assert all(not sampler.shares for sampler in samplers)
    assert len({id(policy) for policy in [*policies, learner.policy]}) == len(samplers) + 1


def test_what_samplers_need_is_published(run: Path):
    assert built(run)[2] == ("policy",)
    assert built(run, "algorithm=nft")[2] == ("old", "policy")
    assert built(run, "ema={decay: 0.5}", "evaluation.weights=ema")[2] == ("policy", "ema")


def test_counts_of_workers(run: Path):
    parts, settings = build(load(run, ["runtime.samplers=3", "runtime.scorers=2"]))
    assert (parts.samplers.size, parts.scorers.size, parts.learners.size) == (3, 2, 1)
    assert settings.steps == 2 and settings.rollout.num_steps == 4


@pytest.mark.parametrize("lora", ["null", "{rank: 2, targets: [residual]}"])
def test_a_twin_trains_alone_and_shares_what_is_frozen(run: Path, lora: str):
    policy = load_policy(load(run, [f"model.lora={lora}"]))
    other = twin(policy)
    net, copy = policy.family.nets["velocity"], other.family.nets["velocity"]
    assert net is not copy
    for name, parameter in net.named_parameters():
        shared = copy.get_parameter(name) is parameter
        assert shared == (not parameter.requires_grad), name
    assert all(any(p is q for q in copy.parameters()) for p in other.parameters.values())
    with torch.no_grad():
        next(iter(other.parameters.values())).add_(1)
    name = next(iter(policy.parameters))
    assert not torch.equal(policy.parameters[name], other.parameters[name])


def test_adapters_start_the_same_for_the_same_seed(run: Path):
    def weights(seed: int) -> dict[str, torch.Tensor]:
        return load_policy(load(run, ["model.lora={rank: 2}", f"seed={seed}"])).weights("policy")

    one, same, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_building_leaves_the_global_generator_alone(run: Path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build(load(run, ["model.lora={rank: 2}", "runtime.samplers=2"]))
    assert torch.equal(torch.get_rng_state(), before)


def test_devices(run: Path):
    def device(name: str) -> torch.device:
        config: RunConfig = load(run, [f"runtime.device={name}"])
        return device_of(config)

    assert device("cpu") == torch.device("cpu")
    assert device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"runtime.device is cuda:99, but there is no such device"):
        device("cuda:99")


def test_who_takes_turns_on_a_gpu_starts_away_from_it(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlalign.build.device_of", lambda config: torch.device("meta"))  # stands for the GPU
    turns = ["runtime.kind=ray", "runtime.placement=colocated", "runtime.offload_idle=true"]
    tree = load(run, turns).tree()
    for worker in (sampler_from(tree), learner_from(tree, 0, 1, "")):
        assert {weight.device.type for weight in worker.policy.parameters.values()} == {"cpu"}
        assert worker.policy.device.type == "meta" and not worker.turn.taken


def test_a_size_that_the_model_cannot_make(run: Path):
    with pytest.raises(ValueError, match="rollout: size"):
        build(load(run, ["rollout.size=[3, 3]"]))


def test_paths_inside_the_folder_that_is_uploaded_are_found_in_any_copy_of_it(run: Path):
    home = run.parent
    tree = load(run).tree()
    moved = movable(tree, home)
    assert moved["rewards"][0]["use"] == "reward.py:first" and moved["prompts"]["train"] == "train.txt"
    assert moved["model"] == tree["model"] and moved["steps"] == tree["steps"]
    assert resolve(moved, home, "config.yaml").tree() == tree
