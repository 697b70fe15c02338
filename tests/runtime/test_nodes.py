"""Machines that come and go under a pool and under a run."""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from rlalign import cli
from rlalign.runtime.cluster import RayRuntime
from rlalign.runtime.config import RuntimeConfig
from tests.chaos.kills import result
from tests.runs import run_file, without_pages
from tests.runtime import clusters, faults
from tests.runtime.killing import Gate, in_background

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head for learner and scorers; machines for samplers come with each test."""
    with clusters.cluster(num_cpus=4, labels={"pool": "head"}, _system_config=clusters.QUICK_DEATH) as made:
        yield made


def sampler_machine(cluster: Cluster) -> Any:
    return cluster.add_node(**clusters.machine(num_cpus=2, labels={"pool": "samplers"}))


def test_what_lay_on_a_lost_machine_is_made_again(cluster: Cluster, tmp_path: Path) -> None:
    first = sampler_machine(cluster)
    config = RuntimeConfig(kind="ray", samplers=1, sampler_labels={"pool": "samplers"}, scorers=1, learners=1)
    runtime = RayRuntime(config)
    try:
        pool = runtime.pool("sampler", partial(faults.faulty, tmp_path), 1)
        judge = runtime.pool("scorer", partial(faults.faulty, tmp_path), 1)
        runtime.wait_until_up()
        pool.hold("hold", "weights")
        pairs = [pool.submit("pair", number, returns=2) for number in (1, 2)]
        assert pool.get([number for number, _ in pairs]) == [1, 2]
        cluster.remove_node(first, allow_graceful=False)
        second = sampler_machine(cluster)
        assert judge.get([judge.submit("total", [tensor for _, tensor in pairs])]) == [3.0 * faults.BIG]
        assert pool.counters()["runtime/reissued"] + judge.counters()["runtime/reissued"] >= 1
        assert pool.workers[0].where is not None
    finally:
        runtime.close()
    cluster.remove_node(second)


def test_a_run_outlives_a_machine(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machines = [sampler_machine(cluster), sampler_machine(cluster)]
    run_file(tmp_path)
    gate = Gate(tmp_path, calls=10)  # one of an evaluation, four of each step
    monkeypatch.chdir(tmp_path)
    without_pages(monkeypatch)
    run = ["train", "run.yaml", "steps=5", "checkpoint.every=2", "evaluation.every=3", "rollout.prompts_per_step=4"]
    assert cli.run([*run, "--run-dir", "calm"]) == 0
    gate.close()

    def all_up() -> bool:
        workers = json.loads((tmp_path / "wild/workers.json").read_text())
        return [worker["state"] for worker in workers if worker["role"] == "sampler"] == ["up"] * 4

    def remove() -> None:
        cluster.remove_node(machines[0], allow_graceful=False)
        while all_up():  # processes outlive their raylet for a while, in which they could do the rest
            time.sleep(0.01)
        gate.open()

    killer = in_background(lambda: gate.reached() and all_up(), remove)
    more = ["runtime.kind=ray", "runtime.spares=false", "runtime.samplers=4", "runtime.sampler_labels={pool: samplers}"]
    assert cli.run([*run, *more, "runtime.min_samplers=2", "--run-dir", "wild"]) == 0
    killer.join(30)
    assert result(Path("wild")) == result(Path("calm"))
    last = json.loads((tmp_path / "wild/metrics.jsonl").read_text().splitlines()[-1])
    assert last["runtime/restarts/sampler"] >= 1
    cluster.remove_node(machines[1])
