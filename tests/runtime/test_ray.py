"""What the pools promise, with workers that die, hang and complain in real processes."""

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.exceptions import OutOfMemoryError

from rlalign.runtime import engine, spares, vacancy
from rlalign.runtime import ray as pools
from rlalign.runtime.cluster import RayRuntime
from rlalign.runtime.config import RuntimeConfig
from rlalign.runtime.placement import Placement
from rlalign.runtime.pool import LearnersLost, WorkerFailure
from rlalign.runtime.ray import RayPool
from rlalign.types import Prompt, Unit
from tests.runtime import faults

pytestmark = pytest.mark.xdist_group("ray")

Make = Callable[..., RayPool]


@pytest.fixture
def make(one_node: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """A pool of workers with faults."""
    monkeypatch.setattr(engine, "PING_EVERY_S", 0.2)
    made: list[RayRuntime] = []

    def pool(
        count: int = 1, build: Any = faults.faulty, memory_gib: float | None = None, warm: Any = None, **settings: Any
    ) -> RayPool:
        config = RuntimeConfig(kind="ray", samplers=count, cpus_per_worker=0, **{"restarts": 1, **settings})
        runtime = RayRuntime(config)
        made.append(runtime)
        if warm is not None:
            runtime.keep_spares(warm)
        pool = runtime.pool("sampler", partial(build, tmp_path), count, memory_gib)
        runtime.wait_until_up()
        return pool

    yield pool
    for runtime in made:
        runtime.close()


@pytest.fixture(scope="module")
def calm(one_node: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:
    """Two workers, for tests in which nothing happens to them."""
    runtime = RayRuntime(RuntimeConfig(kind="ray", samplers=2, cpus_per_worker=0))
    pool = runtime.pool("sampler", partial(faults.faulty, tmp_path_factory.mktemp("calm")), 2)
    runtime.wait_until_up()
    yield pool
    runtime.close()


def test_values_references_and_what_workers_raise(calm: RayPool) -> None:
    pool = calm
    pairs = [pool.submit("pair", number, returns=2) for number in range(3)]
    assert pool.get([number for number, _ in pairs]) == [0, 1, 2]
    assert pool.get([pool.submit("total", [tensor for _, tensor in pairs])]) == [3.0 * faults.BIG]
    assert len(set(pool.get(pool.broadcast("pid")))) == 2
    failed = pool.submit("complains", "too bright")
    dependent = pool.submit("echo", [failed])
    for ref in (failed, dependent):
        with pytest.raises(ValueError, match="too bright") as caught:
            pool.get([ref])
    assert "faults.py" in caught.value.__notes__[0]
    spans = pool.spans()
    assert {span.worker for span in spans} == {"sampler-0", "sampler-1", "driver"}
    assert pool.counters()["runtime/workers/sampler"] == 2
    assert pool.counters()["runtime/restarts/sampler"] == 0


def test_tensors_arrive_as_they_were(calm: RayPool) -> None:
    for dtype in (torch.bfloat16, torch.float64, torch.bool, torch.int64):
        sent = {"many": torch.arange(12).reshape(3, 4).T.to(dtype), "one": torch.tensor(3).to(dtype), "none": None}
        (come,) = calm.get([calm.submit("echo", sent)])
        assert come["none"] is None
        for name in ("many", "one"):
            assert come[name].dtype == dtype and torch.equal(come[name], sent[name])


def test_bytes_in_flight_are_those_that_someone_still_wants(calm: RayPool) -> None:
    gc.collect()  # of the tests before
    ref = calm.submit("pair", 1, returns=2)[1]
    calm.get([calm.submit("total", [ref])])
    assert calm.ledger.bytes_in_flight == 4 * faults.BIG
    del ref
    assert calm.ledger.bytes_in_flight == 0


def test_above_the_limit_only_what_the_driver_waits_for_is_begun(
    calm: RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = calm
    first = pool.submit("pair", 1, returns=2)
    pool.get([pool.submit("total", [first[1]])])
    pool.hold("hold", "old")
    monkeypatch.setattr(pool.engine, "limit", 1.0)
    later = [pool.submit("held", number, returns=2) for number in (2, 3)]
    pool.hold("hold", "new")
    urgent = pool.submit("held", 4, returns=2)  # as an evaluation behind samples of later steps
    pool.engine.pump(0.5)
    assert not later[0][0].call.done
    assert pool.get(urgent) == [4, "new"]
    assert not any(ref.call.done for ref, _ in later)
    assert pool.get(later[1]) == [3, "old"]
    assert not later[0][0].call.done
    assert pool.get(later[0]) == [2, "old"]


def test_nobody_keeps_a_second_call_near_the_end(calm: RayPool) -> None:
    """It would wait behind a slow first one, while others are free."""
    for waiting, each in ((4, 1), (5, 2)):
        refs = [calm.submit("echo", number) for number in range(waiting)]
        calm.feed()
        assert [len(worker.running) for worker in calm.workers] == [each, each]
        assert calm.get(refs) == [*range(waiting)]


def test_a_worker_that_dies_is_replaced_and_its_work_made_again(make: Make) -> None:
    """Also when a new process, unlike the first ones, cannot start."""
    pool = make(2, build=faults.faulty_third, restarts=3)
    assert pool.get([pool.submit("dies_once", number) for number in range(3)]) == [0, 1, 2]
    assert pool.counters()["runtime/restarts/sampler"] == 4
    assert pool.counters()["runtime/reissued"] >= 3


def test_a_worker_that_ray_ends_for_want_of_memory_is_replaced(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make(restarts=3)
    ref = pool.submit("pid")
    pool.feed()
    report = pool.workers[0].running[0].report

    def get(wanted: Any, **options: Any) -> Any:
        if wanted is report:
            raise OutOfMemoryError("the machine is low on memory")
        return ray.get(wanted, **options)

    fake = type("Ray", (), {"get": staticmethod(get), "__getattr__": lambda self, name: getattr(ray, name)})()
    monkeypatch.setattr(pools, "ray", fake)
    before = pool.members()[0]["pid"]
    assert pool.get([ref]) == [pool.members()[0]["pid"]] != [before]


def test_without_any_machine_a_run_waits_in_words_and_then_ends(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vacancy, "SAY_EVERY_S", 0.0)
    pool = make(restarts=3)
    monkeypatch.setattr(pool.placement, "ready", lambda role, index: False)
    monkeypatch.setattr(pool.vacancy, "complaint", lambda: "1 sampler needs what no machine has")
    with pytest.raises(WorkerFailure, match=r"no sampler has had a machine for \d+ s: 1 sampler needs what no machine"):
        pool.config = pool.config.model_copy(update={"machine_timeout_s": 2.0})
        pool.get([pool.submit("dies_once", 1)])
    assert "the run waits, for 2 s at most" in caplog.text


def test_a_group_has_deadlines_and_the_failure_of_one_rank_is_heard_at_once(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "NEWS_S", 0.5)
    runtime = RayRuntime(RuntimeConfig(kind="ray", learners=2, cpus_per_worker=0))
    try:
        pool = runtime.group("learner", partial(faults.Rank, tmp_path), 2, partial(str, "nowhere"))
        runtime.engine.wait(lambda: pool.workers[0].up, lambda start, end: None)
        assert not pool.workers[1].up
        pool.workers[1].since -= 2 * pool.config.call_timeout_s
        runtime.wait_until_up()  # it starts the group again
        assert pool.restarts == 1
        with pytest.raises(LearnersLost, match=r"the learners lost each other.*Connection closed by peer"):
            pool.get(pool.broadcast("loses_the_other"))
        with pytest.raises(ValueError, match="this rank is full"):
            pool.get(pool.broadcast("fails_alone"))
    finally:
        runtime.close()


def until(pool: RayPool, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        pool.engine.pump(0.1)
        assert time.monotonic() < end, "it never came"


def spare(pool: RayPool) -> int:
    """The process that waits on the only machine."""
    assert pool.spares is not None
    until(pool, lambda: bool(pool.spares.kept))
    (actor,) = pool.spares.kept.values()
    return ray.get(actor.run.remote(os.getpid))


def test_a_process_that_waits_takes_the_place_of_one_that_died(make: Make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(spares, "REST_S", 0.0)
    monkeypatch.setattr(spares, "LONG_REST_S", 0.0)
    pool = make(restarts=3, warm=(tmp_path / "imported").touch)
    assert pool.get(pool.hold("hold", "new")) == ["new"]
    waits = spare(pool)
    assert (tmp_path / "imported").exists()
    assert pool.get([pool.submit("dies_once", 1), *pool.broadcast("pid")]) == [1, waits]
    assert pool.get([pool.submit("held", 2)]) == [(2, "new")]
    next_one = spare(pool)
    assert next_one != waits
    assert pool.spares is not None
    kept = [*pool.spares.kept.values()]
    os.kill(next_one, signal.SIGKILL)
    until(pool, lambda: [*pool.spares.kept.values()] != kept)
    assert spare(pool) not in (waits, next_one)


def test_a_process_that_died_while_it_waited_is_no_loss(make: Make) -> None:
    pool = make(warm=os.getpid)
    os.kill(spare(pool), signal.SIGKILL)
    assert pool.get([pool.submit("dies_once", 1)]) == [1]


def test_processes_wait_for_workers_without_a_gpu_only(make: Make, monkeypatch) -> None:
    monkeypatch.setattr(Placement, "gpus", lambda placement, role: 0.5)
    assert make(warm=os.getpid).spares is None


def test_replacements_hold_what_their_predecessors_held(make: Make) -> None:
    pool = make(2)
    assert pool.get(pool.hold("hold", "new")) == ["new", "new"]
    before = [pool.submit("held", number) for number in range(4)]
    died = pool.submit("dies_once", 4)
    pool.hold("hold", "newer")
    after = [pool.submit("held", number) for number in range(4)]
    assert pool.get(before) == [(number, "new") for number in range(4)]
    assert pool.get([died, *after]) == [4, *((number, "newer") for number in range(4))]


def test_what_was_submitted_before_is_made_again_under_what_was_held_then(make: Make) -> None:
    """Also when its worker holds something newer by then."""
    pool = make(1)
    pool.hold("hold", "old")
    old = pool.submit("held", 1, returns=2)
    pool.hold("hold", "new")
    new = pool.submit("held", 2, returns=2)
    assert pool.get([*old, *new]) == [1, "old", 2, "new"]
    old[0].call.again()
    assert pool.get(old) == [1, "old"]


def test_a_worker_that_goes_on_to_something_newer_keeps_nobody_waiting(make: Make) -> None:
    pool = make(1)
    older, newer = pool.hold("hold", "old"), pool.hold("hold", "new")
    assert pool.get([*older, *newer, pool.submit("held", 1)]) == [None, "new", (1, "new")]


def test_death_while_weights_arrive(make: Make) -> None:
    pool = make(2)
    assert sorted(map(str, pool.get(pool.hold("hold", "dies once")))) == ["None", "dies once"]
    assert pool.get([pool.submit("held", 0) for _ in range(4)]) == [(0, "dies once")] * 4
    with pytest.raises(LearnersLost, match="went with the machine of the learners"):
        pool.get(pool.hold("hold", "lost"))
    pool.forget()
    assert {*pool.get(pool.hold("hold", "after it"))} == {"after it"}  # of those that are up


def test_what_hangs_on_something_that_failed_is_held_by_nobody(calm: RayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a learner that cannot publish. It is asked for once, lest the driver never comes to hear of it."""
    made, new = [], calm.queue.new
    monkeypatch.setattr(calm.queue, "new", lambda hold, worker: made.append(worker) or new(hold, worker))
    failed = calm.submit("complains", "too full")
    acknowledged = calm.hold("hold", failed)
    monkeypatch.setattr(calm.queue, "new", lambda hold, worker: pytest.fail("it is asked again"))
    for refs in ([failed], acknowledged):
        with pytest.raises(ValueError, match="too full"):
            calm.get(refs)
    monkeypatch.undo()
    assert sorted(made) == [0, 1]
    assert calm.get(calm.hold("hold", "after it")) == ["after it"] * 2


def test_who_joins_late_keeps_nobody_waiting_and_ends_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first process needs long for its start, at the end of which it complains."""
    machines = {0}
    monkeypatch.setattr(Placement, "ready", lambda placement, role, index: index in machines)
    pool = make(2, build=faults.faulty_late)
    machines.add(1)
    until(pool, lambda: pool.workers[1].starting is not None)
    acknowledged = pool.hold("hold", "new")
    assert len(acknowledged) == 1 and pool.get(acknowledged) == ["new"]
    (tmp_path / "go").touch()
    until(pool, lambda: pool.workers[1].up)
    assert pool.counters()["runtime/restarts/sampler"] == 1
    assert pool.get(pool.broadcast("held", 1)) == [(1, "new")] * 2


def test_nobody_waits_for_a_worker_that_is_given_up(make: Make) -> None:
    pool = make(2, restarts=0)
    first, second = (member["pid"] for member in pool.members())
    os.kill(first, signal.SIGKILL)
    refs = [ref for _ in range(3) for ref in pool.broadcast("pid")]
    until(pool, lambda: all(ref.call.done for ref in refs))
    assert pool.workers[0].retired and pool.get(refs) == [None, second] * 3


def test_who_comes_back_is_told_nothing_while_others_have_its_gpu(make: Make) -> None:
    pool = make(1, restarts=3, placement="colocated", offload_idle=True)
    assert pool.get(pool.hold("hold", "new")) == ["new"]
    os.kill(pool.members()[0]["pid"], signal.SIGKILL)
    until(pool, lambda: pool.restarts == 1 and pool.workers[0].up)
    pool.feed()
    assert not pool.workers[0].running
    assert pool.get([pool.submit("held", 1)]) == [(1, "new")]


@pytest.mark.parametrize(("method", "limits"), [("stops_once", "ping_timeout_s"), ("hangs_once", "call_timeout_s")])
def test_a_worker_that_hangs_is_replaced(make: Make, method: str, limits: str) -> None:
    pool = make(2, restarts=3)
    pool.get(pool.broadcast("pid"))
    started = pool.config
    refs = [pool.submit(method, number) for number in range(4)]
    pool.config = started.model_copy(update={limits: 2.0})  # only now: a busy machine may take longer for a start
    pool.engine.wait(lambda: pool.restarts > 0, lambda start, end: None)
    pool.config = started
    assert pool.get(refs) == [0, 1, 2, 3]
    assert pool.get([pool.submit(method, number) for number in range(4)]) == [0, 1, 2, 3]
    assert pool.counters()["runtime/restarts/sampler"] >= 1  # two when a busy machine starved the other


def test_work_that_kills_every_fresh_worker_is_named(make: Make) -> None:
    pool = make(2, restarts=5)
    unit = Unit(7, (3,), (Prompt("a red circle"),), 4)
    with pytest.raises(
        WorkerFailure, match=r"segfaults of rollout step 7, groups 3, prompts 'a red circle', seed 0, killed 3"
    ):
        pool.get([pool.submit("segfaults", unit)])


def test_workers_that_cannot_live_end_the_run(make: Make) -> None:
    with pytest.raises(WorkerFailure, match="no sampler is left, each died 2 times in a row"):
        make(1, build=faults.stillborn)


def test_what_a_worker_complains_of_at_its_start_is_raised(make: Make) -> None:
    with pytest.raises(ValueError, match="there is no such reward") as caught:
        make(1, build=faults.broken)
    assert caught.value.raised_in.endswith("faults.py")  # pyright: ignore[reportAttributeAccessIssue]


def test_memory_is_capped_and_a_full_process_replaced(make: Make) -> None:
    pool = make(1, memory_gib=0.3)
    assert pool.get([pool.submit("leaks", 0.2) for _ in range(3)]) == [1, 1, 1]
    assert pool.counters()["runtime/restarts/sampler"] == 2


def test_calls_beside_the_work(make: Make) -> None:
    pool = make(2, call_timeout_s=60.0)
    pool.submit("hangs_once", 0)
    pool.engine.pump(0.1)
    answers = pool.wait_aside(pool.aside("pid"), timeout_s=20)
    assert len(set(answers)) == 2
    (error, _) = pool.wait_aside(pool.aside("complains", "no"), timeout_s=20)
    assert isinstance(error, ValueError)
