"""What publishing weights to samplers on one machine costs over moving their bytes.

    python benchmarks/publish.py                                 # a table: 50 MB and 500 MB to 4 samplers
    python benchmarks/publish.py --sizes 50 --samplers 2 --json  # one line

One learner and the samplers are processes of a Ray cluster of their own, one thread each; weights are 400 float32
tensors. "object_store" and "collective" are rlalign's publishers, from the call to the last acknowledgement: pack and
sum up on the learner, hand over, verify names, shapes and checksums on every sampler, copy into its network.

The floor is the same bytes, flat and ready, in the same processes, by plain Ray calls: the learner puts them into the
object store, every sampler gets them and copies them into its network's tensors. "one_pass" adds one pass of the same
checksum (xxh3), on the learner; "pass_each" adds one on the learner and one on every sampler, which is the least that a
check on both ends can cost. Every round measures all of them one after the other.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, final

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}  # before torch and Ray are imported

import ray
import torch
import xxhash
from torch import Tensor, nn

from rlalign.algorithms.grpo import Algorithm
from rlalign.algorithms.grpo import Config as GRPO
from rlalign.mdp.noise import Noise
from rlalign.mdp.schedule import flow_schedule, plain_sigmas
from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.lora import full
from rlalign.policy import Policy, RolloutConfig
from rlalign.runtime.auth import use_token
from rlalign.runtime.cluster import RayRuntime
from rlalign.runtime.collective import Collective
from rlalign.runtime.config import RuntimeConfig
from rlalign.runtime.host import Slot
from rlalign.runtime.ray import RayPool
from rlalign.runtime.weights import ObjectStore, Publisher
from rlalign.types import Cond, Prompt, Schedule, Size
from rlalign.workers.learner import Learner
from rlalign.workers.optimizer import OptimizerConfig
from rlalign.workers.sampler import Sampler
from rlalign.workers.weights import Manifest

TENSORS = 400
MB = 10**6
STORE = 3 * 2**30
HEADS = f"{'median   best':>18}" * 2
FLOORS = ("one_pass", "pass_each")
TRANSPORTS = ("object_store", "collective")


@final
class Family:
    """A network that is nothing but its weights."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = ()
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, num_bytes: int) -> None:
        shape = (num_bytes // (4 * TENSORS),)
        self.net = nn.ParameterList([torch.randn(shape) for _ in range(TENSORS)])
        self.nets: dict[str, nn.Module] = {"net": self.net}

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        return {"none": torch.zeros(len(prompts), 1)}, None

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return (2,)

    def schedule(self, steps: int, size: Size) -> Schedule:
        return flow_schedule(plain_sigmas(steps, 1.0))

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        return x * self.net[0][0]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        return latents

    def save_pipeline(self, folder: object) -> None:
        raise AssertionError("a benchmark saves nothing")


def policy(num_bytes: int) -> Policy:
    family = Family(num_bytes)
    settings = RolloutConfig(size=(1, 1), num_steps=2)
    return Policy(family, settings, full(family.nets, ["net"]), lora=True)  # no second copy as a reference


class BenchedLearner:
    """rlalign's learner, and the floor's."""

    def __init__(self, num_bytes: int, rank: int, size: int, address: str) -> None:
        own = policy(num_bytes)
        self.learner = Learner(own, Algorithm(GRPO()), Noise(0), OptimizerConfig(), None)
        self.flat = torch.cat([parameter.data for parameter in own.parameters.values()]).view(torch.uint8)

    def put(self, check: bool) -> Tensor:
        if check:
            xxhash.xxh3_64_intdigest(self.flat.numpy())
        return self.flat

    def publish(self, *args: Any) -> tuple[Manifest, list[Tensor]]:
        return self.learner.publish(*args)

    def generation(self) -> int:
        return self.learner.generation()

    def join(self, *args: Any) -> int:
        return self.learner.join(*args)

    def exchange(self, *args: Any) -> int:
        return self.learner.exchange(*args)


class BenchedSampler:
    """rlalign's sampler, and the floor's."""

    def __init__(self, num_bytes: int) -> None:
        self.sampler = Sampler(policy(num_bytes), Noise(0), "policy", keep_steps=True, shares=False)
        self.tensors = [parameter.data for parameter in self.sampler.policy.parameters.values()]

    def copy(self, flat: Tensor, check: bool) -> None:
        if check:
            xxhash.xxh3_64_intdigest(flat.numpy())
        for own, sent in zip(self.tensors, flat.view(torch.float32).split(self.tensors[0].numel()), strict=True):
            own.copy_(sent)

    def receive(self, *args: Any) -> dict[str, int]:
        return self.sampler.receive(*args)

    def generation(self) -> int:
        return self.sampler.generation()

    def join(self, *args: Any) -> int:
        return self.sampler.join(*args)

    def exchange(self, *args: Any) -> int:
        return self.sampler.exchange(*args)


def floor(learners: RayPool, samplers: RayPool, check_each: bool) -> None:
    """Bare calls of the processes that stand behind the pools."""
    (learner,), receivers = learners.workers, samplers.workers
    _, flat = learner.actor.call.options(num_returns=2).remote("put", (True,), 1)
    args = ("copy", (Slot(0), check_each), 1, flat)
    reports = [receiver.actor.call.options(num_returns=2).remote(*args)[0] for receiver in receivers]
    for report in ray.get(reports):
        if report.failure is not None:
            raise report.failure.error


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(size_mb: int, num_samplers: int, rounds: int) -> dict[str, float]:
    """Seconds by "<side>_<median|best>_s", and what follows from them."""
    config = RuntimeConfig(kind="ray", samplers=num_samplers, cpus_per_worker=1)
    runtime = RayRuntime(config)
    try:
        learners = runtime.group("learner", partial(BenchedLearner, size_mb * MB), 1, lambda: "")
        samplers = runtime.pool("sampler", partial(BenchedSampler, size_mb * MB), num_samplers)
        runtime.wait_until_up()
        publishers: dict[str, Publisher] = {
            "object_store": ObjectStore(["policy"]),
            "collective": Collective(["policy"]),
        }
        sides = {name: partial(floor, learners, samplers, name == "pass_each") for name in FLOORS}
        taken: dict[str, list[float]] = {name: [] for name in (*FLOORS, *TRANSPORTS)}
        for number in range(rounds + 2):
            found = {name: seconds(work) for name, work in sides.items()}
            for name, publisher in publishers.items():
                found[name] = seconds(partial(publisher.publish, learners, samplers, number))
            if number > 1:  # first touch of memory, the group, and the learner's second set of buckets
                for name, value in found.items():
                    taken[name].append(value)
    finally:
        runtime.close()
    return summary(taken)


def summary(taken: dict[str, list[float]]) -> dict[str, float]:
    result = {f"{name}_median_s": median(values) for name, values in taken.items()}
    result |= {f"{name}_best_s": min(values) for name, values in taken.items()}
    for transport in TRANSPORTS:
        for name in FLOORS:
            pairs = zip(taken[transport], taken[name], strict=True)
            result[f"{transport}_over_{name}"] = median(ours / bare for ours, bare in pairs)
            best = result[f"{transport}_best_s"] / result[f"{name}_best_s"]
            result[f"{transport}_over_{name}_best"] = best
    return result


def table(results: dict[str, dict[str, float]]) -> str:
    lines = []
    for size, result in results.items():
        lines += [
            f"{'':14}{'seconds':>18}{'/ one_pass':>18}{'/ pass_each':>18}",
            f"{size:14}{'median   best':>18}" + HEADS,
        ]
        for name in (*FLOORS, *TRANSPORTS):
            line = f"{name:14}{result[f'{name}_median_s']:9.3f}{result[f'{name}_best_s']:9.3f}"
            if name in TRANSPORTS:
                ratios = [result[f"{name}_over_{bare}{end}"] for bare in FLOORS for end in ("", "_best")]
                line += "".join(f"{ratio:9.2f}" for ratio in ratios)
            lines.append(line)
    return "\n".join([*lines, "ratios: the median of the rounds' own, and that of the two best"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 500], help="MB")
    parser.add_argument("--samplers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="rlalign-") as home:
        os.environ.setdefault("RLALIGN_HOME", home)
        use_token()
        cpus = args.samplers + 4
        ray.init("local", num_cpus=cpus, object_store_memory=STORE, include_dashboard=False, log_to_driver=False)
        try:
            results = {f"{size} MB": measure(size, args.samplers, args.rounds) for size in args.sizes}
        finally:
            ray.shutdown()
    print(json.dumps(results) if args.json else table(results))


if __name__ == "__main__":
    main()
