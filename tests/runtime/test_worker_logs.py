"""Logs of workers: one JSON object a line, small files, and standard error where the folder is out of reach."""

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlalign.runtime.worker_logs import LOGGERS, at_step, install

log = logging.getLogger("rlalign.workers.test")


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """The loggers are as they were, and hold no file open."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [([*one.handlers], one.propagate, one.level) for one in loggers]
    yield
    at_step(None)
    logging.captureWarnings(False)
    for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
        for handler in set(one.handlers) - set(handlers):
            handler.close()
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


def lines(path: Path) -> list[dict[str, Any]]:
    """Without those that say that a process started."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in found if line["message"] != "process started"]


def test_a_line_says_who_where_and_when(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(tmp_path / "logs", "sampler-3")
    log.info("loaded %s", "größer 文字\nnext line")
    at_step(12)
    log.warning("odd")
    log.info("told otherwise", extra={"step": 13})
    first, second, third = lines(tmp_path / "logs" / "sampler-3.jsonl")
    assert set(first) == {"time", "level", "worker", "pid", "node", "logger", "message"}
    assert first["message"] == "loaded größer 文字\nnext line" and first["worker"] == "sampler-3"
    assert first["time"].endswith("+00:00") and first["logger"] == "rlalign.workers.test"
    assert (second["level"], second["step"], third["step"]) == ("WARNING", 12, 13)
    assert capsys.readouterr().err == "WARNING: sampler-3: odd\n"  # the driver's terminal gets no chatter


def test_exceptions_bring_their_traceback(tmp_path: Path) -> None:
    install(tmp_path / "logs", "scorer-0")
    try:
        raise RuntimeError("the scorer is on fire")
    except RuntimeError:
        log.exception("failed")
    (line,) = lines(tmp_path / "logs" / "scorer-0.jsonl")
    assert line["message"] == "failed" and line["traceback"].splitlines()[-1] == "RuntimeError: the scorer is on fire"
    assert "test_worker_logs.py" in line["traceback"]


def test_warnings_of_libraries_are_there_too(tmp_path: Path) -> None:
    install(tmp_path / "logs", "learner-0")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # anew, since catch_warnings put its own in place
        warnings.warn("old-fashioned", DeprecationWarning, stacklevel=1)
    (line,) = lines(tmp_path / "logs" / "learner-0.jsonl")
    assert line["logger"] == "py.warnings" and "DeprecationWarning: old-fashioned" in line["message"]


def test_files_stay_small(tmp_path: Path) -> None:
    install(tmp_path / "logs", "sampler-0", most_bytes=2000)
    for number in range(100):
        log.info("line %d", number)
    files = sorted((tmp_path / "logs").iterdir())
    assert [file.name for file in files] == ["sampler-0.jsonl", "sampler-0.jsonl.1"]
    assert all(file.stat().st_size <= 2000 for file in files)
    assert lines(files[0])[-1]["message"] == "line 99"


def test_a_process_that_follows_another_goes_on_in_its_file(tmp_path: Path) -> None:
    for number in range(2):
        install(tmp_path / "logs", "sampler-0")
        log.info("process %d", number)
    path = tmp_path / "logs" / "sampler-0.jsonl"
    assert [line["message"] for line in lines(path)] == ["process 0", "process 1"]
    assert path.read_text().count("process started") == 2


@pytest.mark.parametrize("where", ["nowhere/run/logs", "file/logs"])
def test_out_of_reach_it_is_standard_error_and_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    (tmp_path / "file").write_text("")
    install(tmp_path / where, "sampler-3")
    log.info("loaded")
    first, _, second = capsys.readouterr().err.splitlines()
    assert first.startswith("WARNING: sampler-3: cannot write logs into") and "standard error" in first
    assert second == "INFO: sampler-3: loaded"
    assert not (tmp_path / "nowhere").exists()
