import threading

import pytest

from rlalign.runtime.local import LocalPool
from rlalign.types import Unit


class Worker:
    def __init__(self, name: str = "") -> None:
        self.name, self.seen = name, []

    def pair(self, value: int) -> tuple[int, str]:
        return value + 1, self.name

    def keep(self, value: object) -> object:
        self.seen.append(value)
        return value

    def fail(self) -> None:
        raise ValueError(f"{self.name} fails")

    def thread(self) -> int:
        return threading.get_ident()


@pytest.fixture
def pool():
    pool = LocalPool("worker", [Worker("a"), Worker("b")], threads=1)
    yield pool
    pool.close()


def test_work_goes_round_and_several_values_have_references_of_their_own(pool: LocalPool) -> None:
    pairs = [pool.submit("pair", n, returns=2) for n in range(3)]
    assert pool.get([number for number, _ in pairs]) == [1, 2, 3]
    assert pool.get([name for _, name in pairs]) == ["a", "b", "a"]


def test_references_in_arguments_become_values_also_inside_lists(pool: LocalPool) -> None:
    number, name = pool.submit("pair", 1, returns=2)
    assert pool.get([pool.submit("keep", [number, (name,)])]) == [[2, ("a",)]]


def test_calls_of_a_worker_keep_their_order_and_broadcasts_stand_between(pool: LocalPool) -> None:
    pool.submit("keep", 1), pool.submit("keep", 1)
    pool.get([*pool.broadcast("keep", "weights"), pool.submit("keep", 2), pool.submit("keep", 2)])
    assert [worker.seen for worker in pool.workers] == [[1, "weights", 2]] * 2


def test_workers_have_threads_of_their_own(pool: LocalPool) -> None:
    threads = pool.get(pool.broadcast("thread"))
    assert len({*threads, threading.get_ident()}) == 3


def test_what_a_worker_raises_is_raised_where_the_value_is_wanted(pool: LocalPool) -> None:
    failed = pool.submit("fail")
    with pytest.raises(ValueError, match="a fails"):
        pool.get([failed])
    with pytest.raises(ValueError, match="a fails"):
        pool.get([pool.submit("keep", failed)])


def test_spans_tell_which_worker_did_what_since_the_last_question(pool: LocalPool) -> None:
    pool.get(pool.scatter("pair", [(1,), (2,)]))
    spans = pool.spans()
    calls = [("driver", "wait worker"), ("worker-0", "pair"), ("worker-1", "pair")]
    assert sorted((span.worker, span.method) for span in spans) == calls
    assert all(span.start <= span.end and span.step is None for span in spans)
    assert pool.spans() == []


def test_spans_of_units_name_the_step_unless_they_are_of_evaluation(pool: LocalPool) -> None:
    units = [Unit(7, (2, 3), (), 4), Unit(0, (1,), (), 4, "evaluation")]
    pool.get(pool.scatter("keep", [(unit,) for unit in units]))
    found = {span.worker: (span.step, span.groups) for span in pool.spans()}
    assert found["worker-0"] == (7, (2, 3)) and found["worker-1"] == (None, (1,))


def test_the_caller_waits_also_for_what_fails(pool: LocalPool) -> None:
    with pytest.raises(ValueError, match="a fails"):
        pool.get([pool.submit("fail")])
    assert sorted((span.worker, span.method) for span in pool.spans()) == [
        ("driver", "wait worker"),
        ("worker-0", "fail"),
    ]


def test_counters_tell_how_many_workers_live(pool: LocalPool) -> None:
    assert pool.counters() == {"runtime/workers/worker": 2.0}
