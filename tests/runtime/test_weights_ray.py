"""Both transports between Ray actors; what a worker that was killed reads when it is back."""

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest
from ray.cluster_utils import Cluster

from rlalign.runtime.cluster import RayRuntime
from rlalign.runtime.collective import Collective
from rlalign.runtime.config import RuntimeConfig
from rlalign.runtime.ray import RayPool
from rlalign.runtime.weights import ObjectStore
from rlalign.workers.learner import Learner
from tests.runtime.members import make_learner, make_sampler

pytestmark = pytest.mark.xdist_group("ray")
NAMES = ("policy", "old")
Pools = tuple[RayPool, RayPool]


def one_rank(rank: int, size: int, address: str) -> Learner:
    return make_learner()


@pytest.fixture(scope="module")
def pools(one_node: Cluster) -> Iterator[Pools]:
    runtime = RayRuntime(RuntimeConfig(kind="ray", samplers=2, cpus_per_worker=1))
    learners = runtime.group("learner", one_rank, 1, partial(str))
    samplers = runtime.pool("sampler", make_sampler, 2)
    runtime.wait_until_up()
    yield learners, samplers
    runtime.close()


def test_by_the_object_store(pools: Pools) -> None:
    publisher = ObjectStore(NAMES, max_staleness=1)
    for version in range(3):
        publisher.publish(*pools, version)
    assert len(publisher.waiting) == 1
    publisher.settle(pools[1])


def test_by_broadcast_and_without_a_group_by_the_store(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Collective(NAMES)
    publisher.publish(*pools, 0)
    assert (publisher.generation, publisher.size) == (1, 3)
    monkeypatch.setattr(publisher, "_alive", lambda *pools: [])
    publisher.publish(*pools, 1)  # every sampler acknowledges what it fetched


def test_a_sampler_that_is_back_reads_the_store_and_joins_the_next_group(pools: Pools) -> None:
    learners, samplers = pools
    publisher = Collective(NAMES)
    publisher.publish(learners, samplers, 0)
    os.kill(samplers.members()[0]["pid"], signal.SIGKILL)
    assert samplers.get(samplers.broadcast("generation")) == [0, 1]  # it has made the call that it missed
    publisher.publish(learners, samplers, 1)
    assert (publisher.generation, publisher.size) == (2, 3)
