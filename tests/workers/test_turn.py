"""Workers that share a GPU: what each moves when it leaves and comes back, and that no number changes by it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlalign.workers.learner import EmaConfig, Learner
from rlalign.workers.turn import Turn
from tests.small import algorithm, sample, scored, workers


class Places:
    """Where everything was sent; there is no other device here to send it to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nets: list[str] = []
        self.tensors: list[str] = []
        to = Tensor.to

        def module_to(module: nn.Module, device: Any) -> nn.Module:
            self.nets.append(str(device))
            return module

        def tensor_to(tensor: Tensor, *args: Any, **more: Any) -> Tensor:
            if len(args) == 1 and str(args[0]) in ("cpu", "gpu"):
                self.tensors.append(str(args[0]))
                return tensor.clone()
            return to(tensor, *args, **more)

        monkeypatch.setattr(nn.Module, "to", module_to)
        monkeypatch.setattr(Tensor, "to", tensor_to)


class Gpu:
    """Stands for a device, so that a move can be told from none."""

    type = "gpu"

    def __str__(self) -> str:
        return "gpu"


def test_all_of_a_learner_leaves_and_comes_back(monkeypatch: pytest.MonkeyPatch):
    """Nets, copies, masters and moments, each once; a second request does nothing."""
    chosen = algorithm("nft")
    sampler, learner = workers(chosen, ema=EmaConfig())
    trajectories = sample(sampler)
    learner.update(trajectories, chosen.advantages(scored(trajectories)), 0)
    learner.policy.device = Gpu()  # pyright: ignore[reportAttributeAccessIssue]
    places = Places(monkeypatch)
    learner.rest()
    weights = len(learner.policy.parameters)
    moved = len(learner.policy.copies) * weights + 3 * weights  # step and two moments
    assert places.nets == ["cpu"] and places.tensors == ["cpu"] * moved
    learner.rest()
    assert places.nets == ["cpu"]
    learner.turn.take()
    learner.turn.take()
    assert places.nets == ["cpu", "gpu"] and places.tensors == ["cpu"] * moved + ["gpu"] * moved


def test_parts_that_wait_anyway_stay(monkeypatch: pytest.MonkeyPatch):
    sampler, _ = workers(algorithm())
    net = sampler.policy.family.nets["velocity"]
    sampler.policy.offloaded.parts = {"vae": [net]}
    places = Places(monkeypatch)
    Turn(sampler.policy).leave()
    assert places.nets == []


@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_rests_change_no_bit(name: str):
    def run(resting: bool) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
        chosen = algorithm(name)
        sampler, learner = workers(chosen, ema=EmaConfig(decay=0.9, every=2))
        metrics: list[dict[str, float]] = []
        for step in range(3):
            trajectories = sample(sampler, step)
            if resting:
                sampler.rest()
            metrics.append(learner.update(trajectories, chosen.advantages(scored(trajectories)), step))
            if resting:
                learner.rest()
        return learner.state_dict().tensors, metrics

    (plain, numbers), (rested, others) = run(False), run(True)
    assert numbers == others and plain.keys() == rested.keys()
    assert all(torch.equal(plain[key], rested[key]) for key in plain)


@pytest.mark.parametrize("call", ["update", "drift", "publish"])
def test_a_learner_takes_its_turn_when_it_computes(call: str):
    chosen = algorithm()
    sampler, learner = workers(chosen)
    trajectories = sample(sampler)
    learner.rest()
    assert not learner.turn.taken
    given: dict[str, tuple[Any, ...]] = {
        "update": (trajectories, chosen.advantages(scored(trajectories)), 0),
        "drift": (trajectories,),
        "publish": (1, ["policy"]),
    }
    getattr(learner, call)(*given[call])
    assert learner.turn.taken


def test_a_sampler_takes_its_turn_when_it_samples():
    sampler, learner = workers(algorithm())
    sampler.rest()
    assert not sampler.turn.taken
    sample(sampler)
    assert sampler.turn.taken
    sampler.rest()
    sampler.receive(*learner.publish(1, ["policy"]))
    assert sampler.turn.taken


def test_a_learner_that_rests_is_saved_and_loaded():
    def made() -> Learner:
        return workers(algorithm())[1]

    chosen = algorithm()
    sampler, learner = workers(chosen)
    trajectories = sample(sampler)
    learner.update(trajectories, chosen.advantages(scored(trajectories)), 0)
    learner.rest()
    other = made()
    other.rest()
    other.load_state_dict(learner.state_dict())
    assert not learner.turn.taken and not other.turn.taken
    for step in (1, 2):
        for one in (learner, other):
            one.update(trajectories, chosen.advantages(scored(trajectories)), step)
    assert all(torch.equal(p, other.policy.parameters[key]) for key, p in learner.policy.parameters.items())
