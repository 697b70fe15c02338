"""The run directory: one command line starts, resumes, and does nothing once finished; nothing is overwritten."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlalign import checkpoint, machine
from rlalign.confighash import checkpoint_hash, differences, hash_of, hashed_part
from rlalign.rundir import Run, RunDir, open_run
from rlalign.types import State


def config(**changes: Any) -> dict[str, Any]:
    return {
        "rewards": [{"use": "composition", "weight": 1.0}],
        "algorithm": {"name": "grpo", "clip_range": 1e-4},
        "runtime": {"kind": "local", "samplers": 1, "threads_per_worker": 1},
        "checkpoint": {"every": 10},
        "steps": 100,
        "seed": 0,
        **changes,
    }


def start(path: Path, fresh: bool = False, **changes: Any) -> Run:
    block = config(**changes)
    return open_run(path, block, hashed_part(block), ["rlalign", "train", "quick start"], fresh)


def save(run: Run, step: int) -> None:
    checkpoint.save(run.files.checkpoints, step, State({}, {"step": step}), 3, run.info.config_hash)


def finish(path: Path, steps: int = 100) -> None:
    with start(path, steps=steps) as run:
        save(run, steps)
        run.mark("finished", steps)


def test_a_first_start_writes_down_what_runs_on_what(tmp_path: Path) -> None:
    with start(tmp_path / "runs" / "quick") as run:
        assert (run.step, run.checkpoint, run.finished) == (0, None, False)
    files = RunDir(tmp_path / "runs" / "quick")
    assert files.read_config() == config()
    info = files.read_info()
    assert (info.status, info.step, info.steps) == ("running", 0, 100)
    assert info.command == "rlalign train 'quick start'"
    assert info.versions["rlalign"] and info.versions["torch"] and info.hardware["cpu_count"] == os.cpu_count()
    assert info.starts[0]["pid"] == os.getpid()
    assert files.samples.is_dir() and files.checkpoints.is_dir()


def test_every_float_of_the_config_survives_yaml(tmp_path: Path) -> None:
    numbers = [1e-15, 1e-4, 0.1 + 0.2, 1e22, 3.0, 5e-324]
    with start(tmp_path / "run", numbers=numbers) as run:
        back = run.files.read_config()["numbers"]
    assert back == numbers and all(isinstance(value, float) for value in back)


def test_an_unfinished_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        save(run, 10)
    with start(tmp_path) as run:
        assert (run.step, run.checkpoint) == (10, tmp_path / "checkpoints" / "step_000010")
        assert [one["step"] for one in run.info.starts] == [0, 10]


def test_an_unfinished_run_without_checkpoint_starts_again(tmp_path: Path) -> None:
    start(tmp_path).close()
    with start(tmp_path) as run:
        assert (run.step, run.checkpoint) == (0, None)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    finish(tmp_path)
    before = (tmp_path / "run.json").read_bytes()
    with start(tmp_path) as run:
        assert run.finished and run.step == 100
    assert (tmp_path / "run.json").read_bytes() == before


def test_more_steps_prolong_a_finished_run_and_fewer_are_refused(tmp_path: Path) -> None:
    finish(tmp_path)
    with start(tmp_path, steps=150) as run:
        assert (run.finished, run.step) == (False, 100)
    assert RunDir(tmp_path).read_config()["steps"] == 150
    with pytest.raises(ValueError, match="already has 100 steps, more than the 50 asked for; use --fresh"):
        start(tmp_path, steps=50)


def test_a_finished_run_without_checkpoints_cannot_be_prolonged(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "checkpoints" / "step_000100").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is finished and its last checkpoint is gone"):
        start(tmp_path, steps=150)


def test_another_config_is_refused_by_its_first_differences(tmp_path: Path) -> None:
    start(tmp_path).close()
    other = {"algorithm": {"name": "nft", "clip_range": 1e-3, "beta": 1.0}, "seed": 1}
    words = (
        r"holds a run with another config \(algorithm.name was 'grpo' and is 'nft', algorithm.clip_range was 0.0001 "
        r"and is 0.001, algorithm.beta is new and 1 more\); use --fresh to move it aside, or --run-dir"
    )
    with pytest.raises(ValueError, match=words):
        start(tmp_path, **other)
    assert RunDir(tmp_path).read_config() == config()


def test_machines_and_intervals_may_change_but_not_what_decides_numbers(tmp_path: Path) -> None:
    start(tmp_path).close()
    start(tmp_path, runtime={"kind": "ray", "samplers": 8, "threads_per_worker": 1}, checkpoint={"every": 5}).close()
    with pytest.raises(ValueError, match=r"runtime.threads_per_worker was 1 and is 2"):
        start(tmp_path, runtime={"kind": "local", "threads_per_worker": 2})


def test_the_number_of_learners_may_change_with_a_word_about_the_last_bits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with start(tmp_path, runtime={"learners": 2}) as run:
        checkpoint.save(run.files.checkpoints, 5, State(), 3, checkpoint_hash(run.info.hashed))
    with caplog.at_level("WARNING"):
        start(tmp_path, runtime={"learners": 1}).close()
    assert caplog.messages == [
        "runtime.learners was 2 and is 1: the last bits of this run's numbers differ from here on"
    ]
    caplog.clear()
    with start(tmp_path, runtime={"learners": 1}) as run:
        assert run.step == 5 and run.info.hashed["runtime.learners"] == 1 and caplog.messages == []
    with pytest.raises(ValueError, match=r"another config \(runtime.learners was 1 and is 2, seed was 0"):
        start(tmp_path, runtime={"learners": 2}, seed=1)


def test_fresh_moves_the_old_run_aside(tmp_path: Path) -> None:
    path = tmp_path / "run"
    finish(path)
    for number in (1, 2):
        with start(path, fresh=True, seed=number) as run:
            assert (run.step, run.finished) == (0, False)
        assert (tmp_path / f"run.old-{number}" / "config.yaml").exists()
    assert RunDir(tmp_path / "run.old-1").read_info().status == "finished"


def test_fresh_where_there_is_nothing_just_starts(tmp_path: Path) -> None:
    start(tmp_path / "run", fresh=True).close()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"status": "lost"}', b"\xff\xfe"])
def test_a_damaged_run_is_refused_in_words_and_rescued_by_fresh(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "run"
    start(path).close()
    (path / "run.json").write_bytes(damage)
    with pytest.raises(ValueError, match=r"run.json is damaged: it is not the JSON of a run; use --fresh"):
        start(path)
    start(path, fresh=True).close()


@pytest.mark.parametrize("damage", [b"", b"a: [", b"- 1", b"\xff\xfe\x00", b"null"])
def test_a_damaged_config_is_refused_in_words(tmp_path: Path, damage: bytes) -> None:
    start(tmp_path).close()
    (tmp_path / "config.yaml").write_bytes(damage)
    with pytest.raises(ValueError, match=r"config.yaml is damaged: it "):
        RunDir(tmp_path).read_config()


def test_places_that_cannot_hold_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"cannot use .* as a run directory: .*file is a file"):
            start(path)
    with pytest.raises(ValueError, match="is not empty and holds no run; choose another place with --run-dir"):
        start(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match=r"cannot use /proc/rlalign/run as a run directory: "):
        start(Path("/proc/rlalign/run"))
    with pytest.raises(ValueError, match=r"there is no run in .*absent: it has no config.yaml"):
        RunDir(tmp_path / "absent").read_config()


def test_a_kill_before_the_first_word_was_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / ".rlalign-lock").write_text("process 1 on gone")
    (tmp_path / ".tmp-config.yaml-1").write_text("half")
    start(tmp_path).close()
    assert not (tmp_path / ".tmp-config.yaml-1").exists()


HOLDER = """
import sys, time
from pathlib import Path
from tests.test_rundir import start
run = start(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_has_one_owner_and_death_frees_it(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    for fresh in (False, True):
        with pytest.raises(ValueError, match=rf"is in use by another process \(process {holder.pid} on "):
            start(tmp_path, fresh)
    holder.kill()
    holder.communicate()
    start(tmp_path).close()


def test_a_refusal_frees_the_directory(tmp_path: Path) -> None:
    start(tmp_path).close()
    with pytest.raises(ValueError, match="another config"):
        start(tmp_path, seed=1)
    start(tmp_path).close()


def test_other_versions_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(tmp_path).close()
    monkeypatch.setattr(machine, "versions", lambda: {"rlalign": "9.9"})
    with caplog.at_level(logging.WARNING):
        start(tmp_path).close()
    assert any("now 9.9: its numbers may differ" in words for words in caplog.messages)


def test_workers_are_listed(tmp_path: Path) -> None:
    with start(tmp_path) as run:
        run.write_workers([{"role": "sampler", "pid": 7, "node": "here", "version": 3}])
    assert json.loads((tmp_path / "workers.json").read_text())[0]["role"] == "sampler"


def test_the_hash_depends_on_meaning_alone() -> None:
    assert hash_of({"a": 1, "b": [1.0, None]}) == hash_of({"b": [1.0, None], "a": 1})
    assert hash_of(hashed_part(config())) == hash_of(hashed_part(config(steps=7)))
    assert hash_of(hashed_part(config())) != hash_of(hashed_part(config(seed=7)))
    assert differences({"a": [{"b": 1}], "c": 2}, {"a": [{"b": 1}]}) == ["c is gone"]
