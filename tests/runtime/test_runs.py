"""Whole runs on Ray, by the command line: whatever happens to workers, they equal the run in one process."""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray.cluster_utils import Cluster

from rlalign import build, cli
from rlalign.checkpoint import load
from rlalign.reporting.spans import read_spans
from rlalign.rundir import RunDir
from rlalign.runtime import engine
from rlalign.scoring.apart import CHILD
from tests.chaos.kills import result
from tests.runs import run_file, without_pages
from tests.runtime import faults
from tests.runtime.killing import Gate, in_background, rows
from tests.scoring.environments import environment

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.usefixtures("one_node")]

RUN = ("steps=5", "checkpoint.every=2", "evaluation.every=3", "rollout.prompts_per_step=4")
ON_RAY = ("runtime.kind=ray", "runtime.cpus_per_worker=0", "runtime.spares=false")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "PING_EVERY_S", 0.5)
    without_pages(monkeypatch)
    return tmp_path


def train(name: str, *overrides: str) -> tuple[str, list[dict[str, Any]]]:
    assert cli.run(["train", "run.yaml", *RUN, *overrides, "--run-dir", name]) == 0
    return result(Path(name))


def test_a_run_on_ray_equals_the_run_in_one_process() -> None:
    local = train("local", "algorithm=nft")
    assert train("two", "algorithm=nft", *ON_RAY, "runtime.samplers=2", "runtime.scorers=2") == local
    workers = json.loads(Path("two/workers.json").read_text())
    places = [(worker["role"], worker["index"]) for worker in workers]
    assert sorted(places) == [("learner", 0), ("sampler", 0), ("sampler", 1), ("scorer", 0), ("scorer", 1)]
    assert len({worker["pid"] for worker in workers} | {os.getpid()}) == 6
    logs = {path.name for path in Path("two/logs").glob("*.jsonl")}
    assert {"sampler-0.jsonl", "learner-0.jsonl"} <= logs


def test_workers_that_take_turns_make_the_same_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    """Each rests while the other works; the learner is saved where it is. Also when the learner dies in its turn."""
    doom(monkeypatch, place / "turns", rank=0)
    turns = ("runtime.placement=colocated", "runtime.offload_idle=true", "algorithm.kl_weight=0")
    assert train("turns", "algorithm=nft", *ON_RAY, *turns) == train("local", "algorithm=nft", "algorithm.kl_weight=0")
    told = [span.method for span in read_spans(RunDir(Path("turns")).spans) if span.worker == "learner-0"]
    assert told.count("rest") >= 5 and "drift" in told
    assert "going on from step 2" in capsys.readouterr().err


def test_work_ahead_is_as_stale_as_allowed_and_the_same_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Ray a sampler dies in the midst of it, and another one of the weights."""
    local = train("local", "runtime.max_staleness=2", "steps=6")
    dying = partial(faults.dying_sampler, run=str(Path("ray").absolute()), steps=[3])
    monkeypatch.setattr(build, "sampler_from", dying)
    other = train("ray", "runtime.max_staleness=2", "steps=6", *ON_RAY, "runtime.samplers=2")
    assert other == local and Path("ray/died-at-step-3").exists()
    assert [row["staleness"] for row in other[1]] == [0, 1, 2, 2, 2, 2]


LEAKING = """
from pathlib import Path

held = []

def first(images, prompts):
    if Path({leaks!r}).exists():
        held.append(bytearray(60 * 2**20))
    return images[:, 0, 0, 0].float() / 255
"""


def test_samplers_die_and_scorers_hang_and_are_full(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    leaks = place / "leaks"
    (place / "reward.py").write_text(LEAKING.format(leaks=str(leaks)))
    calm = train("calm")
    leaks.touch()
    run = place / "wild"
    monkeypatch.setattr(build, "sampler_from", partial(faults.dying_sampler, run=str(run), steps=[1, 3]))
    monkeypatch.setattr(build, "scorer_from", partial(faults.stopping_scorer, run=str(run), step=2))
    more = ("runtime.spares=true", "runtime.samplers=2", "runtime.ping_timeout_s=4", "runtime.scorer_memory_gib=0.6")
    assert train("wild", *ON_RAY, *more) == calm
    marks = {"died-while-weights-arrived", "died-at-step-1", "died-at-step-3", "scorer-stopped"}
    assert marks <= {path.name for path in run.iterdir()}
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["runtime/restarts/sampler"] >= 3
    assert last["runtime/restarts/scorer"] >= 2, "it was stopped once, and full at least once"


def test_a_learner_dies_and_the_run_goes_on_from_its_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    calm = train("calm")
    doom(monkeypatch, place / "wild", rank=0)
    assert train("wild", *ON_RAY) == calm
    assert "going on from step 2" in capsys.readouterr().err


def doom(monkeypatch: pytest.MonkeyPatch, run: Path, rank: int) -> None:
    """This rank dies in the update after the first checkpoint's next."""
    dying = partial(faults.dying_learner, run=str(run), doomed=rank, version=3)
    monkeypatch.setattr(build, "learner_from", dying)


def test_the_driver_is_killed_and_the_same_command_goes_on(
    one_node: Cluster, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate(place, calls=10)  # one of an evaluation, four of each step
    calm = train("calm")
    gate.close()
    command = [sys.executable, "-m", "rlalign", "train", "run.yaml", *RUN, *ON_RAY, "--run-dir", "wild"]
    environment = {**os.environ, "RAY_ADDRESS": one_node.address}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as driver:
        until(lambda: gate.reached() or driver.poll() is not None)
        driver.kill()
        assert gate.reached(), driver.communicate()[1].decode()
    workers = json.loads(Path("wild/workers.json").read_text())
    assert rows(Path("wild")) == 2 and len(workers) == 3
    until(lambda: not any(psutil.pid_exists(worker["pid"]) for worker in workers))
    gate.open()
    capsys.readouterr()
    assert train("wild", *ON_RAY) == calm
    assert "going on at step 2 of 5" in capsys.readouterr().out


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_a_reward_that_segfaults_is_named(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "reward.py").write_text("import os\n\ndef first(images, prompts):\n    os.abort()\n")
    assert cli.run(["train", "run.yaml", *ON_RAY, "--run-dir", "run"]) == 2
    err = capsys.readouterr().err
    assert "score of evaluation step 0" in err and "killed 3 fresh scorers" in err and "'d'" in err


def test_a_reward_that_cannot_be_loaded_is_one_sentence(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    (place / "reward.py").write_text("import nothing_of_that_name\n")
    assert cli.run(["train", "run.yaml", *ON_RAY, "--run-dir", "run"]) == 2
    assert "nothing_of_that_name" in capsys.readouterr().err
    assert not Path("run").exists()


def test_a_reward_in_an_environment_of_its_own_gives_the_same_run(place: Path) -> None:
    """In this process and on Ray, where its process is killed midway."""
    calm, own = train("calm"), f"rewards.0.venv={environment(place / 'venv')}"
    assert train("local", own) == calm
    gc.collect()
    assert not [child for child in psutil.Process().children() if CHILD[1] in child.cmdline()]
    run, found = Path("ray"), list[psutil.Process]()

    def of_the_scorer() -> None:
        for worker in json.loads((run / "workers.json").read_text()):
            if worker["role"] == "scorer":
                found.extend(psutil.Process(worker["pid"]).children())

    in_background((run / "workers.json").exists, of_the_scorer)
    killer = in_background(lambda: bool(found) and rows(run) >= 1, lambda: [child.kill() for child in found])
    assert train("ray", *ON_RAY, own) == calm
    killer.join(10)
    assert len(found) == 1
    assert "it is replaced" in "".join(path.read_text() for path in (run / "logs").glob("scorer-*.jsonl"))


def test_only_references_pass_through_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the driver reads in a run, pickled, against the latents and pictures that were made."""
    import pickle

    from rlalign.runtime import calls, worker
    from rlalign.runtime import ray as pools

    read = 0

    def counted(refs: Any, **options: Any) -> Any:
        nonlocal read
        value = ray.get(refs, **options)
        read += len(pickle.dumps(value))
        return value

    for module in (pools, calls, worker):
        fake = type("Ray", (), {"__getattr__": lambda self, name: counted if name == "get" else getattr(ray, name)})()
        monkeypatch.setattr(module, "ray", fake)
    wide = ("rollout.size=[1, 2000]", "model.means=[" + str([0.0] * 2000) + "]", "steps=3", "evaluation.num_images=4")
    train("run", *wide, *ON_RAY, "checkpoint.every=3")
    made = 3 * 4 * 8 * 2000 * (1 + 3 * 2) * 4  # latents of three steps: the final ones, and both ends of three steps
    assert 0 < read < made / 20


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load(sorted((run / "checkpoints").glob("step_*"))[-1]).tensors


LORA = ("model.lora={rank: 2}", "optimizer.lr=1e-3")
FULL = ("optimizer.lr=1e-3",)


def test_two_learner_ranks_train_adapters_as_one() -> None:
    train("one", *LORA)
    train("two", *LORA, *ON_RAY, "runtime.learners=2")
    assert_near(Path("two"), Path("one"), 1e-6)


def test_two_learner_ranks_train_a_whole_net_as_one_and_outlive_the_loss_of_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    train("one", *FULL)
    two = train("two", *FULL, *ON_RAY, "runtime.learners=2")
    assert_near(Path("two"), Path("one"), 1e-5)
    assert len([*Path("two").rglob("step_000004/learner/shard-*.safetensors")]) == 2
    doom(monkeypatch, place / "wild", rank=1)
    assert train("wild", *FULL, *ON_RAY, "runtime.learners=2") == two
    assert "going on from step 2" in capsys.readouterr().err


def assert_near(run: Path, other: Path, allowed: float) -> None:
    ones, others = weights(run), weights(other)
    policy = [name for name in others if "policy/" in name]
    assert policy
    for name in policy:
        torch.testing.assert_close(ones[name], others[name], rtol=0, atol=allowed)


def test_weights_by_a_group_are_the_weights_by_the_store(caplog: pytest.LogCaptureFixture) -> None:
    local = train("local")
    assert train("ray", *ON_RAY, "runtime.samplers=2", "runtime.transport=collective") == local
    assert "object store" not in caplog.text
