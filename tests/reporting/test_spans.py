"""spans.jsonl: appended, bounded, readable after a kill."""

import json
from pathlib import Path

from rlalign.reporting.spans import SpanLog, earlier, read_spans
from rlalign.types import Span

SPANS = [Span("sampler-0", "sample", 1.5, 2.5, 3, (0, 1)), Span("driver", "wait learner", 2.0, 4.25)]


def test_spans_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    assert read_spans(path) == []
    for _ in range(2):  # a resumed run goes on
        log = SpanLog(path)
        log.write(SPANS)
        log.write([])
        log.close()
    assert read_spans(path) == SPANS * 2


def test_a_torn_line_is_passed_over_and_the_next_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    path.write_text('{"worker": "sampler-0", "meth')
    log = SpanLog(path)
    log.write(SPANS)
    log.close()
    assert read_spans(path) == SPANS


def test_the_file_stays_small_and_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"
    log = SpanLog(path, limit=1000)
    for step in range(40):
        log.write([Span("sampler-0", "sample", step, step + 1, step, (0,))])
    log.close()
    assert path.stat().st_size < 1000 and earlier(path).stat().st_size < 1200
    assert "gone" in json.loads(path.read_text().splitlines()[0])["note"]
    steps = [span.step for span in read_spans(path)]
    assert steps == list(range(steps[0] or 0, 40)) and steps[0] != 0
