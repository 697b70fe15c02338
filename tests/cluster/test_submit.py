"""What `rlalign submit` sends and says, with a cluster that only remembers."""

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from rlalign.commands import submit as command
from rlalign.commands.problems import BadInput
from rlalign.commands.submit import Wish, planned, stop, submit
from rlalign.runtime.jobs import Attempt, Fate, Upload
from rlalign.runtime.processes import Node
from tests.runs import run_file

ADDRESS = "http://127.0.0.1:8265"


class Cluster:
    """Stands in for `Jobs`, called with the address."""

    def __init__(self, *attempts: Attempt, fate: Fate | None = None, log: str = "step 1\n") -> None:
        self.jobs, self.end, self.log = list(attempts), fate or Fate("SUCCEEDED", 0, ""), log
        self.sent: list[tuple[str, str, Upload, str]] = []
        self.followed: list[str] = []
        self.stopped: list[str] = []

    def __call__(self, address: str) -> "Cluster":
        self.address = address
        return self

    def attempts(self, run: str) -> list[Attempt]:
        return [job for job in self.jobs if job.id.rpartition("-")[0] == run]

    def submit(self, attempt: str, entrypoint: str, upload: Upload, run_dir: str) -> None:
        self.sent.append((attempt, entrypoint, upload, run_dir))

    def follow(self, attempt: str, write: Callable[[str], object]) -> Fate:
        self.followed.append(attempt)
        write(self.log)
        return self.end

    def stop(self, attempt: str) -> None:
        self.stopped.append(attempt)


def attempt(name: str, status: str, run_dir: Path | None = None) -> Attempt:
    return Attempt(name, int(name.rpartition("-")[2]), status, run_dir and str(run_dir))


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, outside the repository; the cluster at ADDRESS was started on this machine."""
    run_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(command.ADDRESS, raising=False)
    here = Node("head", "10.0.0.1:6379", ADDRESS, 1, 0.0, "here", "log")
    monkeypatch.setattr(command, "nodes", lambda: [here])
    return tmp_path


def test_the_first_attempt(lab: Path, capsys: pytest.CaptureFixture[str]):
    cluster = Cluster()
    assert submit(Wish("run.yaml", ["optimizer.lr=1e-3"]), connect=cluster) == 0
    ((name, entrypoint, upload, run_dir),) = cluster.sent
    assert (name, cluster.address, run_dir) == ("run-1", ADDRESS, str(lab / "runs" / "run"))
    assert shlex.split(entrypoint) == [
        *("python", "-m", "rlalign", "train", "run.yaml", "runtime.kind=ray", "optimizer.lr=1e-3"),
        *("--run-dir", str(lab / "runs" / "run")),
    ]
    assert upload.folder == lab
    out = capsys.readouterr().out
    assert "step 1\n" in out and "run-1 succeeded" in out and f"--address {ADDRESS} --name run --stop" in out


def test_the_same_command_again_is_the_next_attempt_in_the_same_place(lab: Path):
    done = [attempt(f"run-{n}", "FAILED", lab / "runs" / "run") for n in (1, 2, 10)]
    other = attempt("run-of-somebody-77", "RUNNING")
    cluster = Cluster(*done, other)
    submit(Wish("run.yaml"), connect=cluster)
    assert [(sent[0], sent[3]) for sent in cluster.sent] == [("run-11", str(lab / "runs" / "run"))]


def test_an_attempt_that_is_running_is_followed(lab: Path, capsys: pytest.CaptureFixture[str]):
    cluster = Cluster(attempt("run-1", "FAILED"), attempt("run-2", "RUNNING", lab / "runs" / "run"))
    assert submit(Wish("run.yaml"), connect=cluster) == 0
    assert (cluster.sent, cluster.followed) == ([], ["run-2"])
    assert "run-2 is still running" in capsys.readouterr().out


def test_another_run_of_that_name_is_not_mistaken_for_this_one(lab: Path):
    cluster = Cluster(attempt("run-1", "RUNNING", Path("/elsewhere")))
    with pytest.raises(BadInput, match="run-1 is running in /elsewhere, another run; choose another --name"):
        submit(Wish("run.yaml"), connect=cluster)


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        (Fate("FAILED", 1, ""), "run-1 failed with exit code 1; the same command goes on from the last checkpoint"),
        (Fate("FAILED", 2, ""), "run-1 was refused"),
        (Fate("FAILED", 1, "no package timm"), "run-1 failed: no package timm; the same command"),
        (Fate("STOPPED", 143, ""), "run-1 was stopped; the same command goes on"),
    ],
)
def test_the_exit_code_is_the_runs(lab: Path, capsys: pytest.CaptureFixture[str], fate: Fate, words: str):
    assert submit(Wish("run.yaml"), connect=Cluster(fate=fate)) == fate.code
    assert words in capsys.readouterr().err


def test_no_follow(lab: Path):
    cluster = Cluster()
    assert submit(Wish("run.yaml"), follow=False, connect=cluster) == 0
    assert cluster.sent and not cluster.followed


def test_ctrl_c_leaves_the_job_running(lab: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> Fate:
        raise KeyboardInterrupt

    cluster = Cluster()
    monkeypatch.setattr(cluster, "follow", interrupted)
    assert submit(Wish("run.yaml"), connect=cluster) == 130
    assert "run-1 goes on; the same command follows it again" in capsys.readouterr().err
    assert not cluster.stopped


def test_stop_asks_what_is_running(lab: Path, capsys: pytest.CaptureFixture[str]):
    cluster = Cluster(attempt("run-1", "STOPPED"), attempt("run-2", "RUNNING"))
    assert stop(Wish("run.yaml"), connect=cluster) == 0
    assert cluster.stopped == ["run-2"]
    assert stop(Wish("other.yaml"), connect=Cluster()) == 0
    assert "no attempt of other is running" in capsys.readouterr().out


def test_a_job_sees_its_folder_and_what_it_is_given(lab: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("BEAUTY_TOKEN", "s3cret")
    wish = Wish("run.yaml", exclude=["*.mp4"], pip=["timm"], env=["BEAUTY_TOKEN", "A=b=c"], run_dir=lab / "out")
    env = planned(wish).upload.runtime_env()
    assert env["working_dir"] == str(lab) and env["pip"] == ["timm"]
    assert {".git/", ".venv/", "runs/", "*.mp4", "/out/"} <= set(env["excludes"])
    assert {"BEAUTY_TOKEN": "s3cret", "A": "b=c"}.items() <= env["env_vars"].items()
    assert int(env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60  # else a stopped run is killed before it saves


def test_a_run_file_deeper_in_the_folder(lab: Path):
    (lab / "runs_of_mine").mkdir()
    (lab / "run.yaml").rename(lab / "runs_of_mine" / "a.yaml")
    plan = planned(Wish("runs_of_mine/a.yaml", working_dir=Path()))
    assert plan.upload.folder == lab and " train runs_of_mine/a.yaml " in plan.entrypoint and plan.name == "a"


def test_a_recipe_needs_no_upload(lab: Path):
    plan = planned(Wish("quickstart", name="mine"))
    assert "working_dir" not in plan.upload.runtime_env()
    assert " train quickstart " in plan.entrypoint and plan.run_dir == lab / "runs" / "mine"


def test_names_come_from_the_run(lab: Path):
    assert planned(Wish("run.yaml", run_dir=Path("/shared/my runs/seed 1"))).name == "seed-1"


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Wish("none.yaml"), "there is no run file none.yaml"),
        (Wish("run.yaml", ["optimizer.lr=-1"]), "optimizer.lr"),
        (Wish("run.yaml", ["model.memory.embeddings=kept"]), "model.memory.embeddings .* none would outlive the job"),
        (Wish("run.yaml", name="a b"), "cannot name a job"),
        (Wish("run.yaml", address="127.0.0.1:6379"), "not that of a dashboard"),
        (Wish("run.yaml", address="http://10.0.0.9:8265"), "--run-dir /shared/runs/run"),
        (Wish("run.yaml", working_dir=Path("/usr")), "choose another --working-dir"),
        (Wish("run.yaml", env=["NOT_SET_ANYWHERE"]), "there is no variable NOT_SET_ANYWHERE"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_sent(lab: Path, wish: Wish, words: str):
    cluster = Cluster()
    with pytest.raises(BadInput, match=words):
        submit(wish, connect=cluster)
    assert not cluster.sent


def test_the_address_may_stand_in_the_environment(lab: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(command.ADDRESS, "http://10.0.0.9:8265/")
    assert planned(Wish("run.yaml", run_dir=Path("/shared/a"))).address == "http://10.0.0.9:8265"
