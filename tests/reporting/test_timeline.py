"""The picture of the last steps: which lanes, which bars."""

import base64

from rlalign.reporting.timeline import MOST_LANES, bars, chosen, merged, neighbours, timeline
from rlalign.types import Span


def spans(samplers: int = 2) -> list[Span]:
    found = []
    for step in range(3):
        start = 10.0 * step
        found += [Span(f"sampler-{i}", "sample", start, start + 4 + i % 3, step, (i,)) for i in range(samplers)]
        found += [
            Span("scorer-0", "score", start + 6, start + 6.5, step),
            Span("learner-0", "update", start, start + 9),
        ]
        found += [
            Span("driver", "wait learner", start + 0.5, start + 9),
            Span("driver", "step", start, start + 9.9, step),
        ]
    return found


def test_a_lane_for_the_driver_and_each_worker() -> None:
    lanes = bars(spans(), [(0, 9.9), (10, 19.9)])
    assert list(lanes) == ["driver", "sampler-0", "sampler-1", "scorer-0", "learner-0"]
    assert lanes["driver"] == {"loop": [(0, 0.5), (9, 9.9), (10, 10.5), (19, 19.9)]}
    assert lanes["sampler-1"] == {"rollout": [(0, 5), (10, 15), (20, 25)]}


def test_steps_with_something_long_between_are_not_shown_together() -> None:
    assert neighbours([(0, 9), (50, 59), (60, 69), (70, 79)]) == [(50, 59), (60, 69), (70, 79)]
    assert neighbours([(0, 9), (10, 19), (20, 29)], most=2) == [(10, 19), (20, 29)]
    assert neighbours([(0, 9), (10, 19), (50, 59)]) == [(0, 9), (10, 19)]  # rather than a step alone
    assert neighbours([(0, 9), (50, 59)]) == [(50, 59)]
    assert neighbours([]) == []


def test_short_gaps_are_not_drawn() -> None:
    assert merged([(5, 6), (0, 1), (1.001, 2), (9, 20), (-3, -1)], (0, 10)) == [(0, 2), (5, 6), (9, 10)]


def test_of_many_samplers_some_are_shown_and_the_others_counted() -> None:
    shown, hidden = chosen(["driver", *(f"sampler-{i}" for i in range(64)), "learner-0"])
    assert len(shown) == MOST_LANES + 2 and hidden == {"sampler": 64 - MOST_LANES}
    picture = timeline(spans(64))
    assert picture is not None and f"{64 - MOST_LANES} more samplers" in picture.explanations[0][1]


def test_the_picture_names_lanes_and_kinds() -> None:
    assert timeline([]) is None
    picture = timeline(spans())
    assert picture is not None
    svg = base64.b64decode(picture.image.partition("base64,")[2]).decode()
    for text in ("sampler-1", "learner-0", "rollout", "loop"):
        assert f"<!-- {text} -->" in svg
    assert "<!-- evaluation -->" not in svg
