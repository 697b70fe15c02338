"""Checkpoints: what is saved comes back to the bit, and a broken one is never used."""

import errno
import json
import logging
import math
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rlalign import checkpoint
from rlalign.checkpoint import (
    CheckpointConfig,
    FileRecord,
    committed,
    fault,
    latest,
    load,
    read_part,
    save,
    sweep,
    write_part,
)
from rlalign.types import State

CONFIG = "c" * 64


def state(step: int = 0) -> State:
    return State(
        {
            "policy/down": torch.arange(6.0) + step,
            "old/down": torch.ones(2, 3),
            "optimizer/down/exp_avg": torch.zeros(3),
        },
        {"algorithm": {"baseline": {"7": 0.1 + 0.2}}, "updates": step},
    )


def put(folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        save(folder, step, state(step), keep, CONFIG)


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in committed(folder)]


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    tensors = {"a/matrix": tensor, "a/scalar": tensor[0, 0], "a/empty": tensor[:0], "plain": tensor.T, "b/view": tensor}
    loaded = load(save(tmp_path, 1, State(tensors), 1, CONFIG)).tensors
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], value), name


def test_plain_values_come_back_exactly(tmp_path: Path) -> None:
    values = {
        "floats": [0.1 + 0.2, 1e-320, 1.7976931348623157e308, math.inf, -0.0],
        "int": 2**70,
        "none": None,
        "é": True,
    }
    loaded = load(save(tmp_path, 1, State({}, {**values, "nan": math.nan}), 1, CONFIG)).values
    assert math.isnan(loaded.pop("nan"))
    assert loaded == values and math.copysign(1, loaded["floats"][-1]) == -1


def test_keys_that_json_would_change_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"State.values\['baseline'\] has the key 7: only strings"):
        save(tmp_path, 1, State({}, {"baseline": {7: 0.5}}), 1, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_one_file_a_part_and_the_same_bytes_for_the_same_state(tmp_path: Path) -> None:
    one, two = (save(tmp_path / name, 3, state(), 1, CONFIG) for name in ("one", "two"))
    names = {path.name for path in one.iterdir()}
    assert names == {"policy.safetensors", "old.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    assert checkpoint.read_manifest(one) == checkpoint.read_manifest(two)


def test_nothing_saved_yet(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") is None
    assert latest(tmp_path) is None


def test_the_newest_is_found(tmp_path: Path) -> None:
    put(tmp_path, 8, 10, 1_000_000)
    found = latest(tmp_path, CONFIG)
    assert found is not None and found == (1_000_000, tmp_path / "step_1000000")
    assert load(found[1]).values["updates"] == 1_000_000


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "policy.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "policy.safetensors").write_bytes(data)


def truncate(path: Path) -> None:
    (path / "policy.safetensors").write_bytes((path / "policy.safetensors").read_bytes()[:-1])


def wrong_step(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "step": 9}))


def other_format(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))


DAMAGE = {
    "policy.safetensors has the wrong SHA-256": flip_a_bit,
    "policy.safetensors has 103 bytes instead of 104": truncate,
    "state.json is missing": lambda path: (path / "state.json").unlink(),
    "manifest.json cannot be read (No such file or directory)": lambda path: (path / "manifest.json").unlink(),
    "manifest.json makes no sense": lambda path: (path / "manifest.json").write_bytes(b"\xff{"),
    "its manifest says step 9": wrong_step,
    "it is of format 1, and this version reads 2": other_format,
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_broken_one_is_named_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture, words: str) -> None:
    put(tmp_path, 8, 10)
    DAMAGE[words](tmp_path / "step_000010")
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path, CONFIG) == (8, tmp_path / "step_000008")
    assert caplog.messages == [f"checkpoint step_000010 is broken: {words}; using step_000008"]
    with pytest.raises(ValueError, match="step_000010 is broken"):
        load(tmp_path / "step_000010")


def test_one_of_another_config_is_not_used(tmp_path: Path) -> None:
    put(tmp_path, 8)
    with pytest.raises(ValueError, match=r"step_000008 is broken: it was made under another config \(c{12}, not d"):
        latest(tmp_path, "d" * 64)


def test_when_all_are_broken_nothing_starts_over_by_itself(tmp_path: Path) -> None:
    put(tmp_path, 8)
    flip_a_bit(tmp_path / "step_000008")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used .*delete them to begin at step 0"):
        latest(tmp_path)


def test_only_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    scores = {10: 0.5, 20: 0.9, 30: 0.9, 40: 0.1, 45: 2.0, 50: math.nan}
    for step in (10, 20, 30, 40, 50, 60):
        save(tmp_path, step, state(step), 2, CONFIG, {at: score for at, score in scores.items() if at <= step})
    assert steps_in(tmp_path) == [20, 50, 60]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000020", "step_000050", "step_000060"]


def test_a_broken_later_one_does_not_push_out_a_sound_one(tmp_path: Path) -> None:
    put(tmp_path, 8, 10)
    flip_a_bit(tmp_path / "step_000010")
    save(tmp_path, 9, state(9), 1, CONFIG)
    assert steps_in(tmp_path) == [9]


def test_a_sound_one_is_left_alone_and_a_broken_one_replaced(tmp_path: Path) -> None:
    put(tmp_path, 10)
    before = (tmp_path / "step_000010" / "manifest.json").stat().st_mtime_ns
    put(tmp_path, 10)
    assert (tmp_path / "step_000010" / "manifest.json").stat().st_mtime_ns == before
    flip_a_bit(tmp_path / "step_000010")
    put(tmp_path, 10)
    assert fault(tmp_path / "step_000010", CONFIG) is None


def test_parts_that_others_write_belong_to_it(tmp_path: Path) -> None:
    part = State({"policy/w": torch.arange(3.0), "ema/w": torch.zeros(3)}, {"updates": 5})
    path = save(tmp_path, 5, state(), 1, CONFIG, others=lambda folder: write_part(folder, "learner", part))
    assert load(path, without="learner").values == state().values
    whole = load(path)
    assert whole.tensors.keys() == state().tensors.keys() | {"learner/policy/w", "learner/ema/w"}
    for found in (whole.part("learner"), read_part(path, "learner")):
        assert found.values == part.values and torch.equal(found.tensors["policy/w"], part.tensors["policy/w"])
    (path / "learner.json").unlink()
    assert fault(path) == "learner.json is missing"


@pytest.mark.parametrize("sharded", [False, True])
def test_some_of_a_part_can_be_read_alone(sharded: bool, tmp_path: Path) -> None:
    part = State({"policy/w": torch.arange(3.0), "optimizer/w/exp_avg": torch.zeros(3)}, {"updates": 5})
    write_part(tmp_path, "learner", part)
    if sharded:  # as several ranks leave it
        (tmp_path / "learner").mkdir()
        (tmp_path / "learner.safetensors").rename(tmp_path / "learner" / "shard-00001-model-00001-of-00001.safetensors")
    found = read_part(tmp_path, "learner", only="policy/")
    assert found.tensors.keys() == {"policy/w"} and torch.equal(found.tensors["policy/w"], part.tensors["policy/w"])
    assert not read_part(tmp_path, "learner", only="ema/").tensors


def test_what_others_say_they_wrote_has_to_be_there(tmp_path: Path) -> None:
    put(tmp_path, 8)
    elsewhere = {"learner.json": FileRecord(bytes=2, sha256="0" * 64)}
    with pytest.raises(ValueError, match=r"learner.json is not what .* must be on a disk that all share"):
        save(tmp_path, 10, state(), 1, CONFIG, others=lambda folder: elsewhere)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000008"]


def test_sweeping_removes_only_rubbish(tmp_path: Path) -> None:
    put(tmp_path, 10)
    for name in (".tmp-12-99", ".del-step_000008-0a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "policy.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-config.yaml-99").write_bytes(b"half")
    sweep(tmp_path)
    sweep(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["step_000010"]


def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 8)
    write = checkpoint.write_durably

    def full(path: Path, data: bytes) -> None:
        if path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_durably", full)
    with pytest.raises(ValueError, match=r"^cannot save checkpoint step_000010 in .*: No space left on device$"):
        put(tmp_path, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000008"]
    assert latest(tmp_path, CONFIG) == (8, tmp_path / "step_000008")


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_write_that_really_fails_leaves_the_earlier_ones(tmp_path: Path) -> None:
    put(tmp_path, 8)
    with files_at_most(4096), pytest.raises(ValueError, match=r"cannot save checkpoint step_000010 .*: File too large"):
        save(tmp_path, 10, State({"policy/big": torch.zeros(10_000)}), 9, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000008"]


def test_settings() -> None:
    assert CheckpointConfig() == CheckpointConfig(every=10, keep=3, keep_best=None)
    for wrong in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="greater than 0"):
            CheckpointConfig(**wrong)  # pyright: ignore[reportArgumentType]


def child(script: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


KILLED_EVERYWHERE = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from rlalign.checkpoint import committed, fault, latest, save, sweep
from rlalign.types import State
from tests.test_checkpoint import CONFIG, flip_a_bit

def put(folder, *steps):
    for step in steps:
        save(folder, step, State({"policy/w": torch.ones(2)}), 3 - (step == 10), CONFIG)

def dies_at(folder, operation):  # whether it did: False once there are fewer operations
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, args):
            nonlocal seen
            if event == "os.remove" or event.startswith(("open", "os.")) and str(folder) in str(args):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        put(folder, 10)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

kills = 0
for replacing in (False, True):
    base = Path(sys.argv[1], f"{replacing}")
    put(base, 8, 9)
    if replacing:  # a broken one of the same step stands in the way
        put(base, 10)
        flip_a_bit(base / "step_000010")
    operation, died = 0, True
    while died:
        operation += 1
        folder = Path(sys.argv[1], f"{replacing}-{operation}")
        shutil.copytree(base, folder)
        died = dies_at(folder, operation)
        kills += died
        step, newest = latest(folder, CONFIG)
        assert step in (9, 10), (operation, step)
        assert replacing or all(fault(path) is None for _, path in committed(folder)), operation
        sweep(folder)
        put(folder, 10)
        assert latest(folder, CONFIG)[0] == 10
        assert all(path.name.startswith("step_") for path in folder.iterdir())
print(kills)
"""


def test_killed_before_any_file_operation_the_newest_one_is_sound(tmp_path: Path) -> None:
    assert int(child(KILLED_EVERYWHERE, tmp_path)) > 20


KILLED_AT_RANDOM = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from rlalign.checkpoint import committed, fault, latest, load, save, sweep
from rlalign.types import State

folder = Path(sys.argv[1])

def commit_forever(step, pipe):
    sweep(folder)
    while True:
        step += 1
        tensors = {f"{part}/w": torch.full((20_000,), float(step)) for part in ("policy", "optimizer")}
        save(folder, step, State(tensors, {"step": step}), 2, "hash")
        os.write(pipe, b"%d\\n" % step)

moments = random.Random()
for trial in range(8):
    found = latest(folder, "hash")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        commit_forever(found[0] if found else 0, write)
    os.close(write)
    first = os.read(read, 100)  # at least one commit, then any moment
    time.sleep(moments.uniform(0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        acknowledged = int((first.decode() + pipe.read()).split()[-1])
    step, newest = committed(folder)[-1]
    assert fault(newest, "hash") is None, (trial, newest)
    assert step >= acknowledged, (trial, step, acknowledged)
    assert latest(folder, "hash") == (step, newest)
    assert all(float(t[0]) == float(t[-1]) == step for t in load(newest).tensors.values())
print(step)
"""


def test_killed_at_random_moments_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    assert int(child(KILLED_AT_RANDOM, tmp_path)) >= 8
