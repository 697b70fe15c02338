"""The division of machines, by hand."""

import pytest

from rlalign.commands.split import Places, Team, Work, best, idle, lines, measured, parts, step_time
from rlalign.runtime.config import RuntimeConfig
from rlalign.types import Span

WORK = Work(rollout=6.0, reward=0.6, update=2.0, units=24, groups=24)


def test_with_and_without_overlap() -> None:
    team = Team(samplers=3, scorers=1, learners=1)
    assert parts(WORK, team) == pytest.approx((2.0, 0.6, 2.0))
    assert step_time(WORK, team, 0) == pytest.approx(4.0)
    assert step_time(WORK, team, 1) == step_time(WORK, team, 2) == pytest.approx(2.0)
    assert idle(WORK, team, 0) == pytest.approx({"samplers": 0.5, "scorers": 0.85, "learners": 0.5})
    assert idle(WORK, team, 1) == pytest.approx({"samplers": 0.0, "scorers": 0.7, "learners": 0.0})


def test_colocated_workers_take_turns() -> None:
    team = Team(4, 1, 4, colocated=True)
    assert step_time(WORK, team, 0) == step_time(WORK, team, 1) == pytest.approx(1.5 + 0.5)


def test_units_are_not_divided() -> None:
    three = Work(rollout=6.0, reward=0.0, update=2.0, units=3, groups=24)
    assert step_time(three, Team(2, 1, 1), 1) == pytest.approx(4.0)  # one sampler has two of the three units
    assert idle(three, Team(2, 1, 1), 1)["samplers"] == pytest.approx(0.25)
    assert best(three, Places(64, "GPU"), 1).samplers == 3  # a fourth would have nothing to do


@pytest.mark.parametrize(
    ("work", "places", "staleness", "team"),
    [
        (WORK, Places(4, "GPU"), 1, Team(3, 1, 1)),
        (WORK, Places(8, "GPU"), 1, Team(6, 1, 2)),
        (WORK, Places(4, "GPU"), 0, Team(4, 1, 4, colocated=True)),
        (WORK, Places(1, "GPU"), 1, Team(1, 1, 1, colocated=True)),
        (WORK, Places(2, "GPU"), 1, Team(1, 1, 1)),
        # scorers on the CPU are free: as many as it takes that nobody waits for them, 12 / 6 = 2
        (Work(6.0, 12.0, 2.0, 24, 24), Places(4, "GPU"), 1, Team(3, 6, 1)),
        # a scorer takes a whole place: 1 + 2 + 1 of 4 give max(6, 6, 2)
        (Work(6.0, 12.0, 2.0, 24, 24), Places(4, "GPU", scorer=1.0), 1, Team(1, 2, 1)),
        # four of them share one: max(6 / 2, 12 / 4, 2), which a third sampler would not shorten
        (Work(6.0, 12.0, 2.0, 24, 24), Places(5, "GPU", scorer=0.25), 1, Team(2, 4, 1)),
    ],
)
def test_the_best_team(work: Work, places: Places, staleness: int, team: Team) -> None:
    assert best(work, places, staleness) == team


def test_a_run_measures_its_work() -> None:
    spans = [Span("driver", "step", 10.0 * step, 10.0 * step + 9, step) for step in range(2)]
    for step in range(2):
        start = 10.0 * step + 1
        spans += [Span(f"sampler-{i}", "sample", start, start + 3, step, (i,)) for i in range(2)]
        spans += [Span("scorer-0", "score", start, start + 0.5, step), Span("learner-0", "update", start, start + 2)]
        spans += [Span("sampler-0", "sample", start + 5, start + 6, None, (0,))]  # evaluation
    assert measured(spans, 24, 24) == Work(6.0, 0.5, 2.0, 24, 24)
    assert measured(spans[:2], 24, 24) is None and measured([], 24, 24) is None


def test_in_words() -> None:
    assert list(lines(WORK, RuntimeConfig(samplers=2), Places(4, "GPU"))) == [
        "as configured, max_staleness 0: 2 samplers, 1 scorer, 1 learner (idle: samplers 40%, scorers 88%, learners "
        "60%)",
        "4 GPUs, max_staleness 0: 4 samplers, 1 scorer, 4 learners, colocated (idle: samplers 25%, scorers 70%, "
        "learners 75%); 2.5 times as fast",
        "4 GPUs, max_staleness 1: 3 samplers, 1 scorer, 1 learner (idle: samplers 0%, scorers 70%, learners 0%); 2.5 "
        "times as fast",
    ]
    unknown = Work(6.0, 0.0, 2.0, 24, 24)
    assert "scorers" not in next(lines(unknown, RuntimeConfig(), Places(1, "GPU")))
