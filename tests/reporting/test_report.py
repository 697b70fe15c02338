"""report.html: everything in one file, of finished, unfinished and empty runs; damage is said in words."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlalign.reporting import summary
from rlalign.reporting.report import write_report
from tests.reporting.example import TASKS, example_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "quickstart"
    example_run(path).close()
    return path


class Links(HTMLParser):
    """Everything that a browser would fetch, and whether all tags are closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_stands_alone(finished: Path) -> None:
    page = write_report(finished).read_text()
    assert page == write_report(finished).read_text()  # the same run, the same bytes
    parsed = Links(page)
    assert parsed.open == []
    assert len(parsed.links) > 8 and all(link.startswith("data:image/") for link in parsed.links)
    assert not re.search(r"https?://|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", page))


def test_the_report_says_what_matters(finished: Path) -> None:
    page = write_report(finished, {"odd_metric": "Mine alone."}).read_text()
    for words in ("0.330 → 0.550", "+0.220", "0.92 × base", "12 of 12", "2,304", "sampler and learner agree exactly"):
        assert words in page, words
    for words in (
        *TASKS,
        "clip_saturation",
        "lower optimizer.lr &lt;b&gt;",
        "Mine alone.",
        "clip_range: 0.0001",
        "torch",
    ):
        assert words in page, words
    assert page.count("<figure") == 4 and "before training" in page and "after 12 updates" in page


def test_an_unfinished_run_has_a_report(tmp_path: Path) -> None:
    example_run(tmp_path / "run", steps=100, done=3, every=10).close()
    page = write_report(tmp_path / "run").read_text()
    assert "interrupted" in page and "3 of 100" in page and "of the base; not evaluated since" in page


def test_a_run_without_evaluations_or_steps_has_a_report(tmp_path: Path) -> None:
    example_run(tmp_path / "run", steps=5, done=2, every=100).close()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text()
    (tmp_path / "run" / "metrics.jsonl").write_text(re.sub(r', "eval/[^,}]*', "", rows))
    shutil.rmtree(tmp_path / "run" / "samples")
    assert "no held-out evaluation" in write_report(tmp_path / "run").read_text()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "0 of 5" in write_report(tmp_path / "run").read_text()


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "metrics.jsonl", "alarms.jsonl"])
def test_a_damaged_run_is_said_to_be(finished: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / name).write_text("{nonsense\n")
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        write_report(tmp_path / "run")


def test_where_there_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no run in .*: it has no run.json"):
        write_report(tmp_path)


def test_numbers_are_short() -> None:
    shown = {0.0: "0", 1.0: "1", 0.33333: "0.333", -12.34: "−12.3", 19200: "19,200", 1234.5: "1,234", 1.5e-7: "1.5e−07"}
    assert {value: summary.number(value) for value in shown} == shown
    assert (summary.number(None), summary.signed(0.25), summary.signed(-0.25)) == ("–", "+0.250", "−0.250")
    assert [summary.duration(total) for total in (1.25, 75, 3725)] == ["1.2 s", "1 min 15 s", "1 h 02 min"]


def test_evaluations_stand_at_the_updates_their_weights_had() -> None:
    rows = [{"step": 0, "eval/kid": 3.0}, {"step": 1}, {"step": 2, "eval/kid": None, "eval_final/kid": 1.0}]
    assert summary.evaluations(rows) == {"kid": {0: 3.0, 3: 1.0}}
    assert summary.changes({"kid": {0: 3.0, 3: 1.0}}) == [summary.Change("kid", 3.0, 1.0)]


def test_a_narrowed_model_is_marked() -> None:
    rows = [{"step": 0, "diversity": 1.0}, {"step": 1, "diversity": 0.7}]
    (card,) = (card for card in summary.cards(rows, {}, {}) if card.title == "Diversity")
    assert card.warning and card.value == "0.70 × base"
