"""Whether the driver keeps up with many samplers: its own seconds of a step against the step.

    python benchmarks/scale.py                                    # 16, 64 and 256 samplers
    python benchmarks/scale.py --samplers 256 --unit-seconds 1 --json

The pipeline, the pools, the placement groups and Ray are the real ones, on simulated machines: several raylets on this
one. What is simulated are the workers: all samplers of a machine are one process, in which a unit is a sleep and some
bytes, since real processes take 0.3 GB each. A step is 4 units a sampler, then as many scores, then one update.

"driver" is the time that the driver did not spend waiting for news, "ideal" the step if handing out work took no time:
all units are sampled, then the scorers are at those that came last.
A driver below 100% of the step has time left; samplers wait for it when the step is much longer than the ideal.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_prestart_worker_first_driver": "0"}

import numpy as np
import ray
import torch
from ray.cluster_utils import Cluster

from rlalign.pipeline import Pipeline, deal, gather
from rlalign.policy import RolloutConfig
from rlalign.prompts import PromptSet
from rlalign.runtime import wire, worker
from rlalign.runtime.auth import use_token
from rlalign.runtime.cluster import RayRuntime
from rlalign.runtime.config import RuntimeConfig
from rlalign.runtime.host import Report, Setup, Where, filled
from rlalign.runtime.pool import DRIVER
from rlalign.types import Prompt, RewardScores, Scores, Span, Unit

MACHINES = 4
UNITS_PER_SAMPLER = 4
SAMPLES = 8
SCORING = 0.1  # of the time that sampling takes


@dataclass(frozen=True, slots=True)
class Measured:
    samplers: int
    units: int
    placed_s: float  # placement groups, and workers that are up
    step_s: float
    ideal_s: float
    driver_s: float
    share: float  # driver_s / step_s


@ray.remote(max_concurrency=4096)
class Machine:
    """Many workers that only sleep."""

    def __init__(self, unit_s: float, payload: int) -> None:
        wire.register()
        self.unit_s, self.payload = unit_s, payload
        self.locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def setup(self, setup: Setup) -> tuple[Where, None]:
        return Where(os.getpid(), setup.name, "127.0.0.1", ray.get_runtime_context().get_node_id()), None

    async def call(self, name: str, method: str, args: Any, returns: int, *values: Any) -> Any:
        given = filled(args, values)
        async with self.locks[name]:  # a worker makes its calls one after the other
            started = time.time()
            await asyncio.sleep({"sample": self.unit_s, "score": self.unit_s * SCORING}.get(method, 0.0))
        results = getattr(self, method)(*given)
        span = Span(name, method, started, time.time())
        return Report(span, None, (self.payload,) * returns), *(results if returns > 1 else (results,))

    def sample(self, unit: Unit) -> Any:
        return np.zeros(self.payload, np.uint8), np.zeros(self.payload, np.uint8)

    def score(self, images: Any, unit: Unit, roles: Any) -> Scores:
        values = torch.rand(len(unit.prompts), unit.samples)
        rewards = {"reward": RewardScores(values, torch.ones_like(values, dtype=torch.bool), "train", 1.0)}
        return Scores(rewards, tuple(prompt.text for prompt in unit.prompts), torch.ones(len(unit.prompts)))

    def update(self, trajectories: list[Any], *share: Any) -> dict[str, float]:
        return {"bytes": float(sum(map(len, trajectories)))}

    async def ping(self) -> None:
        pass


class Method:
    """An actor's method, of one of a machine's workers."""

    def __init__(self, method: Any, *first: Any) -> None:
        self.method, self.first = method, first

    def options(self, **options: Any) -> "Method":
        return Method(self.method.options(**options), *self.first)

    def remote(self, *args: Any) -> Any:
        return self.method.remote(*self.first, *args)


class Stand:
    """In the place of `Host`: a worker of the next machine in turn."""

    machines: Sequence[Any] = ()
    made = 0

    @classmethod
    def options(cls, **options: Any) -> type["Stand"]:
        return cls

    @classmethod
    def remote(cls) -> "Stand":
        cls.made += 1
        return cls(cls.machines[cls.made % len(cls.machines)])

    def __init__(self, machine: Any) -> None:
        self.setup, self.ping = Method(machine.setup), Method(machine.ping)
        self.call = Method(machine.call, f"worker-{Stand.made}")


@contextmanager
def simulated(samplers: int) -> Iterator[None]:
    """Machines with room for all of them."""
    temp = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    cluster = Cluster(shutdown_at_exit=True)
    try:
        for number in range(MACHINES):
            head = {"include_dashboard": False, "temp_dir": temp} if number == 0 else {}
            cluster.add_node(num_cpus=samplers // MACHINES + 32, object_store_memory=200 * 2**20, **head)
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def measure(samplers: int, unit_s: float, steps: int, payload: int) -> Measured:
    Stand.machines = [
        Machine.options(num_cpus=0, scheduling_strategy="SPREAD").remote(unit_s, payload) for _ in range(MACHINES)
    ]
    scorers = max(1, samplers // 8)
    started = time.perf_counter()
    runtime = RayRuntime(RuntimeConfig(kind="ray", samplers=samplers, scorers=scorers, restarts=0))
    try:
        sampling = runtime.pool("sampler", None, samplers)  # pyright: ignore[reportArgumentType]
        scoring = runtime.pool("scorer", None, scorers)  # pyright: ignore[reportArgumentType]
        learning = runtime.pool("learner", None, 1)  # pyright: ignore[reportArgumentType]
        runtime.wait_until_up()
        placed = time.perf_counter() - started
        settings = RolloutConfig(
            prompts_per_step=UNITS_PER_SAMPLER * samplers, samples_per_prompt=SAMPLES, size=(1, 1), micro_batch=SAMPLES
        )
        prompts = PromptSet(tuple(Prompt(f"prompt {number}") for number in range(1000)))
        pipeline = Pipeline(sampling, scoring, prompts, settings, 0, range(steps + 1), 0)
        times: list[tuple[float, float]] = []
        for _ in range(steps + 1):
            times.append(one_step(pipeline, (sampling, scoring, learning)))
        step, driver = (median(column) for column in zip(*times[1:], strict=True))  # the first one warms up
    finally:
        runtime.close()
    ideal = UNITS_PER_SAMPLER * unit_s + samplers / scorers * unit_s * SCORING
    units = UNITS_PER_SAMPLER * samplers
    return Measured(samplers, units, placed, step, ideal, driver, driver / step)


def one_step(pipeline: Pipeline, used: tuple[Any, Any, Any]) -> tuple[float, float]:
    """Seconds of a step, and of the driver in it."""
    _, scoring, learning = used
    started = time.perf_counter()
    batch = pipeline.take()
    scores = gather(scoring, batch)
    learning.get(learning.scatter("update", deal(batch, scores.total, scores.valid, 1, 1)))
    step = time.perf_counter() - started
    waited = sum(span.end - span.start for pool in used for span in pool.spans() if span.worker == DRIVER)
    return step, step - waited


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--unit-seconds", type=float, default=2.0, help="how long a sampler is at a unit")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--payload", type=int, default=100_000, help="bytes of a unit's trajectory, and of its pictures"
    )
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    os.environ.setdefault("RLALIGN_HOME", tempfile.mkdtemp(prefix="rlalign-"))
    use_token()
    worker.Host = Stand  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
    results: list[Measured] = []
    for samplers in chosen.samplers:
        with simulated(samplers):
            results.append(measure(samplers, chosen.unit_seconds, chosen.steps, chosen.payload))
    if chosen.json:
        print(json.dumps([asdict(result) for result in results]))
        return
    print("samplers | units | placed s | step s | ideal s | driver s | driver / step")
    for r in results:
        numbers = (f"{n:8.2f}" for n in (r.placed_s, r.step_s, r.ideal_s, r.driver_s))
        print(f"{r.samplers:8} | {r.units:5} | {' | '.join(numbers)} | {r.share:.1%}")


if __name__ == "__main__":
    main()
