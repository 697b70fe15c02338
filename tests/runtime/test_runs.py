"""Whole runs on Ray, by the command line: whatever happens to workers, they equal the run in one process."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from rlalign import build, cli
from rlalign.reporting.spans import read_spans
from rlalign.rundir import RunDir
from rlalign.runtime import engine
from tests.chaos.kills import result
from tests.runs import run_file, without_pages
from tests.runtime import faults
from tests.runtime.killing import kill, rows

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


def test_workers_that_take_turns_make_the_same_run() -> None:
    """Each rests while the other works; the learner is saved where it is."""
    turns = ("runtime.placement=colocated", "runtime.offload_idle=true", "algorithm.kl_weight=0")
    assert train("turns", "algorithm=nft", *ON_RAY, *turns) == train("local", "algorithm=nft", "algorithm.kl_weight=0")
    told = [span.method for span in read_spans(RunDir(Path("turns")).spans) if span.worker == "learner-0"]
    assert told.count("rest") >= 5 and "drift" in told


def test_work_ahead_is_as_stale_as_allowed_and_the_same_in_both() -> None:
    local = train("local", "runtime.max_staleness=2", "steps=6")
    other = train("ray", "runtime.max_staleness=2", "steps=6", *ON_RAY, "runtime.samplers=2")
    assert other == local
    assert [row["staleness"] for row in other[1]] == [0, 1, 2, 2, 2, 2]


def test_samplers_and_scorers_die_and_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = train("calm")
    run = Path("wild")
    dying = partial(faults.sampler_that_dies_while_weights_arrive, run=str(run.absolute()))
    monkeypatch.setattr(build, "sampler_from", dying)
    killers = [
        kill("sampler", 0, run, lambda: rows(run) >= 1, signal.SIGKILL),
        kill("scorer", 0, run, lambda: rows(run) >= 2, signal.SIGSTOP),
        kill("sampler", 1, run, lambda: rows(run) >= 3, signal.SIGKILL),
    ]
    wild = train("wild", *ON_RAY, "runtime.spares=true", "runtime.samplers=2", "runtime.ping_timeout_s=4")
    for thread in killers:
        thread.join(10)
    assert wild == calm
    assert (run / "died-while-weights-arrived").exists()


def test_a_learner_dies_and_the_run_goes_on_from_its_last_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    calm = train("calm")
    run = Path("wild")
    killer = kill("learner", 0, run, lambda: rows(run) >= 3, signal.SIGKILL)
    assert train("wild", *ON_RAY) == calm
    killer.join(10)
    assert "going on from step" in capsys.readouterr().err


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
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    return load_file(newest / "learner.safetensors")


LORA = ("model.lora={rank: 2}", "optimizer.lr=1e-3")


def test_two_learner_ranks_train_as_one_and_outlive_the_loss_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    train("one", *LORA)
    two = train("two", *LORA, *ON_RAY, "runtime.learners=2")
    one, both = weights(Path("one")), weights(Path("two"))
    policy = [name for name in one if "policy/" in name]
    assert policy
    for name in policy:
        torch.testing.assert_close(both[name], one[name], rtol=0, atol=1e-6)
    run = Path("wild")
    killer = kill("learner", 1, run, lambda: rows(run) >= 3, signal.SIGKILL)
    assert train("wild", *LORA, *ON_RAY, "runtime.learners=2") == two
    killer.join(10)
    assert "going on from step" in capsys.readouterr().err


def test_weights_by_a_group_are_the_weights_by_the_store() -> None:
    local = train("local")
    assert train("ray", *ON_RAY, "runtime.samplers=2", "runtime.transport=collective") == local
    logs = "".join(path.read_text() for path in Path("ray/logs").glob("*.jsonl"))
    assert "object store" not in logs
