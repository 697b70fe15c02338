"""Shares and seconds by hand: two samplers, a scorer and a learner in a window of ten seconds."""

import pytest

from rlalign.reporting.advice import advice
from rlalign.reporting.timing import (
    Readings,
    Split,
    by_role,
    covered,
    in_order,
    kind,
    own_work,
    splits,
    step_times,
    step_windows,
    within,
)
from rlalign.types import Span

WINDOW = (100.0, 110.0)
SPANS = [
    Span("sampler-0", "sample", 98, 104, step=3, groups=(0, 1)),  # begun before the window
    Span("sampler-0", "receive", 109, 110),
    Span("sampler-1", "sample", 100, 108, step=3, groups=(2,)),
    Span("scorer-0", "score", 104, 105, step=3),
    Span("learner-0", "update", 105, 109),
    Span("learner-0", "drift", 109, 109.5),
    Span("driver", "wait scorer", 100.5, 105),
    Span("driver", "wait learner", 105, 109.5),
]


def test_a_method_is_of_a_kind() -> None:
    assert [kind(span) for span in SPANS] == [
        *("rollout", "publish", "rollout", "reward", "update", "other", "waiting", "waiting")
    ]
    assert kind(Span("sampler-0", "sample", 0, 1, groups=(0,))) == "evaluation"


def test_what_overlaps_counts_once() -> None:
    spans = [Span("a", "m", *times) for times in ((0, 4), (1, 2), (3, 6), (8, 20))]
    assert covered(spans, (2, 10)) == 4 + 2
    assert covered([], (2, 10)) == 0


def test_the_numbers_of_a_step() -> None:
    assert step_times(Readings(SPANS, {}), WINDOW) == pytest.approx(
        {
            "time/rollout_s": 14,  # whole, also what lay before
            "time/reward_s": 1,
            "time/update_s": 4,
            "time/publish_s": 1,
            "time/driver_s": 1,
            "time/idle/sampler_s": 3.5,
            "time/idle/scorer_s": 9,
            "time/idle/learner_s": 5.5,
            "runtime/busy/sampler": 0.65,
            "runtime/busy/sampler/min": 0.5,
            "runtime/busy/sampler/max": 0.8,
            "runtime/busy/scorer": 0.1,
            "runtime/busy/learner": 0.45,
        }
    )


def test_workers_that_did_nothing_are_idle() -> None:
    counts = {"runtime/workers/sampler": 4.0, "runtime/workers/scorer": 0.0, "runtime/workers/learner": 1.0}
    times = step_times(Readings(SPANS[:3], counts), WINDOW)
    assert times["runtime/busy/sampler"] == pytest.approx((0.5 + 0.8) / 4) and times["runtime/busy/sampler/min"] == 0
    assert times["runtime/busy/learner"] == 0 and times["time/idle/learner_s"] == 10
    assert "runtime/busy/scorer" not in times


def test_the_driver_works_between_its_waits() -> None:
    waits = [Span("driver", "wait learner", *times) for times in ((0, 2), (3, 5), (4, 7), (9, 12))]
    assert own_work(waits, (1, 10)) == [(2, 3), (7, 9)]
    assert own_work(waits, (7.5, 8)) == [(7.5, 8)]
    assert own_work([], (0, 1)) == [(0, 1)]


def test_every_worker_splits_its_time() -> None:
    found = {one.worker: one for one in splits(SPANS, [(100, 105), (105, 110)])}
    assert list(found) == ["driver", "sampler-0", "sampler-1", "scorer-0", "learner-0"]
    assert found["driver"].busy == pytest.approx(0.1) and found["driver"].other == pytest.approx(0.1)
    assert found["sampler-0"].phases["rollout"] == pytest.approx(0.4)
    assert found["sampler-0"].phases["publish"] == pytest.approx(0.1)
    assert found["sampler-0"].idle == pytest.approx(0.5)
    assert found["learner-0"].other == pytest.approx(0.05)
    assert [len(ones) for ones in by_role(found.values()).values()] == [1, 2, 1, 1]
    assert splits([], []) == []


def test_steps_are_where_the_driver_says() -> None:
    steps = [Span("driver", "step", start, start + 2, step) for step, start in enumerate((5, 0, 9))]
    assert step_windows([*steps, *SPANS]) == [(0, 2), (5, 7), (9, 11)]
    assert step_windows(steps, last=1) == [(9, 11)]
    assert [span.worker for span in within(SPANS, [(109.2, 109.4)])] == ["sampler-0", "learner-0", "driver"]
    assert within(SPANS, []) == []


def test_workers_are_in_the_order_of_a_step_and_of_numbers() -> None:
    names = ["learner-0", "sampler-10", "sampler-9", "other-1", "driver", "scorer-0"]
    assert sorted(names, key=in_order) == ["driver", "sampler-9", "sampler-10", "scorer-0", "learner-0", "other-1"]


def workers(driver: float, samplers: list[float], scorer: float, *learners: float) -> dict[str, list[Split]]:
    def of(role: str, *busy: float) -> list[Split]:
        return [Split(role, f"{role}-{i}", {}, share) for i, share in enumerate(busy)]

    return {
        "driver": of("driver", driver),
        "sampler": of("sampler", *samplers),
        "scorer": of("scorer", scorer),
        "learner": of("learner", *learners),
    }


@pytest.mark.parametrize(
    ("found", "staleness", "words"),
    [
        (
            workers(0.01, [0.97, 0.97], 0.1, 0.3),
            1,
            "Samplers are busy 97% of the time (scorers 10%, learners 30%): add samplers (runtime.samplers).",
        ),
        (
            workers(0.01, [0.4, 0.5], 0.1, 0.99),
            1,
            "Learners are busy 99% of the time (samplers 45%, scorers 10%): add learner ranks (runtime.learners, with "
            "runtime.kind ray); or fewer samplers do as well.",
        ),
        (
            workers(0.01, [0.5], 0.95, 0.3),
            2,
            "Scorers are busy 95% of the time (samplers 50%, learners 30%): add scorers (runtime.scorers).",
        ),
        (
            workers(0.01, [0.6], 0.1, 0.3),
            0,
            "Roles work one after the other (samplers 60%, scorers 10%, learners 30%): runtime.max_staleness 1 lets "
            "them overlap; or add samplers (runtime.samplers).",
        ),
        (
            workers(0.2, [0.6], 0.1, 0.3),
            0,
            "The loop itself is at work 20% of the time, and all workers wait for it (samplers 60%, scorers 10%, "
            "learners 30%).",
        ),
        (
            workers(0.01, [0.95, 0.5], 0.1, 0.9),
            1,
            "Samplers are busy from 50% to 95% of the time: a step's units should divide among them evenly (fewer "
            "samplers, or smaller units).",
        ),
        (
            workers(0.01, [0.6, 0.5], 0.1, 0.7),
            1,
            "No role is busy all the time (samplers 55%, scorers 10%, learners 70%): they wait for each other; a "
            "higher max_staleness may help.",
        ),
    ],
)
def test_advice(found: dict[str, list[Split]], staleness: int, words: str) -> None:
    assert advice(found, staleness) == words


def test_no_advice_where_nothing_is_known() -> None:
    assert advice({}, 0) is None
    assert advice({"driver": [Split("driver", "driver", {}, 0.1)]}, 1) is None
