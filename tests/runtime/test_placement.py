import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from rlalign.runtime.config import RuntimeConfig
from rlalign.runtime.placement import Placement, machines
from tests.runtime.clusters import machine

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("three_nodes")]
Seat = tuple[str, tuple[int, ...]]


def node_name(node_id: str) -> str:
    """Its only label of ours: head, a100, h100."""
    labels = next(machine.labels for machine in machines() if machine.id == node_id)
    return next(labels[key] for key in ("pool", "gpu") if key in labels)


@pytest.fixture
def made() -> Iterator[list[Placement]]:
    made: list[Placement] = []
    yield made
    for placement in made:
        placement.release()
    until(lambda: not groups())


@pytest.fixture
def placed(made: list[Placement]) -> Callable[..., Placement]:
    def place(join_s: float = 0.0, wait_s: float = 10.0, **options: object) -> Placement:
        made.append(Placement(RuntimeConfig(kind="ray", **options)))
        made[-1].reserve(wait_s, join_s)
        return made[-1]

    return place


def seats(placement: Placement, **counts: int) -> list[Seat]:
    """Of tiny workers that are made as the pool makes its own."""

    class Worker:  # in here, so that its process need not import this file
        def seat(self) -> tuple[str, list[int]]:
            return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()

    workers = [
        ray.remote(Worker).options(**placement.options(role, index)).remote()
        for role, count in counts.items()
        for index in range(count)
    ]
    found = ray.get([worker.seat.remote() for worker in workers], timeout=120)
    for worker in workers:
        ray.kill(worker)
    return [(node_name(node), tuple(gpus)) for node, gpus in found]


def groups() -> list[str]:
    return [group["name"] for group in placement_group_table().values() if group["state"] != "REMOVED"]


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def test_learners_samplers_and_scorers_have_gpus_of_their_own(placed: Callable[..., Placement]) -> None:
    placement = placed(learners=4, samplers=8, scorers=4, gpus_per_scorer=0.25)
    found = seats(placement, learner=4, sampler=8, scorer=4)
    learners, samplers, scorers = found[:4], found[4:12], found[12:]
    assert len({node for node, _ in learners}) == 1
    whole = Counter((node, gpu) for node, gpus in learners + samplers for gpu in gpus)
    assert len(whole) == 12 and set(whole.values()) == {1}
    shared = Counter((node, gpu) for node, gpus in scorers for gpu in gpus)
    assert shared.total() == 4 and not shared.keys() & whole.keys()
    assert all(placement.ready(role, index) for role, n in (("learner", 4), ("sampler", 8)) for index in range(n))
    assert [line.split(":")[0] for line in placement.describe()] == [
        "4 learners, 1 GPU and 1 CPU each",
        "8 samplers, 1 GPU and 1 CPU each",
        "4 scorers, 0.25 GPUs and 1 CPU each",
    ]


def test_a_colocated_pair_is_on_one_gpu(placed: Callable[..., Placement]) -> None:
    placement = placed(
        learners=3, samplers=3, placement="colocated", gpus_per_learner=0.6, gpus_per_sampler=0.4, scorers=1
    )
    found = seats(placement, learner=3, sampler=3)
    assert found[:3] == found[3:]
    assert len(set(found)) == 3 and all(len(gpus) == 1 for _, gpus in found)


def test_labels_choose_the_machine(placed: Callable[..., Placement]) -> None:
    labels = {"sampler_labels": {"gpu": "h100"}, "learner_labels": {"gpu": "!h100"}, "scorer_labels": {"pool": "head"}}
    placement = placed(learners=2, samplers=2, scorers=1, **labels)
    found = seats(placement, learner=2, sampler=2, scorer=1)
    assert [node for node, _ in found] == ["a100", "a100", "h100", "h100", "head"]


def test_workers_that_take_nothing_still_go_where_their_labels_say(placed: Callable[..., Placement]) -> None:
    placement = placed(cpus_per_worker=0, device="cpu", scorer_labels={"gpu": "a100"})
    assert "scheduling_strategy" not in placement.options("scorer", 0) and groups() == []
    assert seats(placement, scorer=1) == [("a100", ())]
    assert placement.ready("scorer", 0) and placement.gpus("scorer") == 0


def test_ranks_on_one_machine_are_neighbours(placed: Callable[..., Placement]) -> None:
    placement = placed(learners=10, samplers=1)
    node_of = {seat: node for seat, node in enumerate(placement._where("learners"))}
    nodes = [node_of[placement.options("learner", rank)["scheduling_strategy"].placement_group_bundle_index]
             for rank in range(10)]  # fmt: skip
    assert sorted(Counter(nodes).values()) == [2, 8]
    assert nodes == sorted(nodes)


def test_what_the_machines_could_never_hold_is_refused_before_anything_is_asked(
    placed: Callable[..., Placement], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Placement, "_await", lambda *_: pytest.fail("waited for what cannot be"))
    said = (
        r"runtime: 13 samplers need 13 GPUs and 13 CPUs \(.*\), but there is room for 12: .* have 16 GPUs and 40 CPUs"
    )
    with pytest.raises(ValueError, match=said):
        placed(learners=4, samplers=13)
    assert groups() == []


def test_what_others_use_is_waited_for(placed: Callable[..., Placement]) -> None:
    others = busy(8)
    said = r"runtime: \d of 9 samplers, which need 1 GPU and 1 CPU each, found no place within 1 s: of the cluster's"
    with pytest.raises(ValueError, match=said + r" 16 GPUs and 40 CPUs, 8 GPUs and 40 CPUs are free for this run"):
        placed(learners=3, samplers=9, wait_s=1.0)
    until(lambda: len(groups()) == 1)  # theirs
    timer = threading.Timer(0.5, remove_placement_group, [others])
    timer.start()
    assert placed(learners=3, samplers=9, wait_s=30.0).ready("sampler", 8)
    timer.join()


def busy(gpus: int) -> PlacementGroup:
    """Somebody else's run, on one machine."""
    others = placement_group([{"GPU": gpus}], name="others")
    until(lambda: placement_group_table(others)["state"] == "CREATED")
    return others


def test_samplers_come_and_go_with_machines(placed: Callable[..., Placement], three_nodes: Cluster) -> None:
    """The last test, since it changes the cluster."""
    more = machine(num_cpus=1, num_gpus=1, labels={"gpu": "l40"})
    config = {"samplers": 2, "min_samplers": 1, "sampler_labels": {"gpu": "l40"}}
    with pytest.raises(ValueError, match=r"1 sampler needs .* room for none: the cluster has no machine with gpu=l40"):
        placed(**config)
    with pytest.raises(ValueError, match="no machine with gpu=l40"):
        placed(**config, join_s=0.2)
    until(lambda: not groups())

    with ThreadPoolExecutor(1) as starting:
        start = starting.submit(placed, **config, join_s=60.0)
        node = three_nodes.add_node(**more)
        placement = start.result()
    up = [index for index in range(2) if placement.ready("sampler", index)]
    assert up == [0]
    assert placement.describe()[1].startswith("2 samplers (at least 1) with gpu=l40, 1 GPU and 1 CPU each: 1 on ")
    assert placement.describe()[1].endswith(", 1 without a place")

    three_nodes.add_node(**more)
    until(lambda: placement.ready("sampler", 1))

    three_nodes.remove_node(node, allow_graceful=False)
    until(lambda: not placement.ready("sampler", 0))
    assert placement.ready("sampler", 1)
    assert not placement.renew("sampler", 0)  # Ray looks for another place by itself
    assert placement.complaint() is None  # one is enough
    three_nodes.add_node(**more)
    until(lambda: placement.ready("sampler", 0))
    assert seats(placement, sampler=1) == [("l40", (0,))]

    remove_placement_group(placement.made["sampler 0"])
    until(lambda: placement.renew("sampler", 0))
    until(lambda: placement.ready("sampler", 0))
