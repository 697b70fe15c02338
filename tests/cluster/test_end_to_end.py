"""A user's reward in a folder outside the repository, by the README's commands, on a real cluster of this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rlalign.runtime import auth
from rlalign.runtime.telemetry import EXPORTED, prometheus_name
from tests.runs import run_file

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(420)]

REWARD = """\
import os

def sharpness(images, prompts):
    assert "_ray_pkg_" in os.getcwd(), "not in the uploaded folder"
    return images[:, 0, 0, 0].float() / 255
"""


@dataclass(frozen=True, slots=True)
class Shell:
    """The user's shell: a home and a project folder of their own."""

    home: Path
    project: Path
    folders: list[Path]  # of Ray, to be removed

    def __call__(self, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "rlalign", *arguments]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return subprocess.run(
            command, cwd=self.project, env={**clean, auth.HOME: str(self.home), **env}, capture_output=True, text=True
        )


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    made = Shell(tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("my_project"), [])
    path = run_file(made.project)
    (made.project / "my_rewards.py").write_text(REWARD)
    path.write_text(path.read_text().replace("reward.py:first", "my_rewards.py:sharpness"))
    yield made
    made("cluster", "stop", "--all")
    for folder in made.folders:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def dashboard(shell: Shell) -> str:
    started = shell("cluster", "start", "--port", "0", "--dashboard-port", "0", "--num-cpus", "3")
    assert started.returncode == 0, started.stderr
    (port,) = re.findall(r"^head +\S+:(\d+)", started.stdout, re.MULTILINE)
    shell.folders.append(Path(f"/tmp/rlalign-{os.getuid()}") / port)
    (address,) = re.findall(r"^dashboard +(\S+)", started.stdout, re.MULTILINE)
    return address


def status(url: str, token: str | None = None) -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


@contextmanager
def exported(shell: Shell) -> Iterator[set[str]]:
    """Names of our metrics on the nodes' ports, as Prometheus would have found them inside the block.

    They are there from seconds after the first row on, until seconds after the job.
    """
    (record,) = [json.loads(path.read_bytes()) for path in (shell.home / "nodes").glob("*.json")]
    folder = Path(f"/tmp/rlalign-{os.getuid()}") / record["address"].rpartition(":")[2]
    seen, over = set[str](), threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            for found in json.loads((folder / "prom_metrics_service_discovery.json").read_text()):
                for target in found["targets"]:
                    with suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                        seen.update(re.findall(r"^ray_rlalign_\w+(?=\{)", answer.read().decode(), re.MULTILINE))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield seen
    over.set()
    thread.join()


def test_a_reward_of_the_users_own_trains_and_the_same_command_goes_on(shell: Shell, dashboard: str):
    with exported(shell) as metrics:
        first = shell("submit", "run.yaml", "steps=1")
    assert first.returncode == 0, first.stdout + first.stderr
    always = {"rlalign_reward_mean", "rlalign_steps", "rlalign_workers", "rlalign_in_flight_bytes"}
    assert {prometheus_name(name) for name in always} <= metrics <= {prometheus_name(name) for name in EXPORTED}
    assert "run-1 succeeded" in first.stdout
    again = shell("submit", "run.yaml")  # prolonged to the run file's two steps
    assert again.returncode == 0, again.stdout + again.stderr
    assert "going on at step 1 of 2" in again.stdout and "run-2 succeeded" in again.stdout
    rows = [json.loads(line) for line in (shell.project / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and "reward/sharpness/mean" in rows[1]
    workers = json.loads((shell.project / "runs/run/workers.json").read_text())
    assert {worker["role"] for worker in workers} == {"sampler", "scorer", "learner"}
    assert len({worker["pid"] for worker in workers}) == 3


def test_bad_input_in_the_job_is_exit_code_2(shell: Shell, dashboard: str):
    refused = shell("submit", "run.yaml", "prompts.train=/nowhere.txt", "--name", "lost")
    assert refused.returncode == 2
    assert "lost-1 was refused" in refused.stderr and "/nowhere.txt" in refused.stdout


def test_without_the_token_nothing_is_told(shell: Shell, dashboard: str):
    assert status(f"{dashboard}/api/jobs/") == 401
    assert status(f"{dashboard}/api/jobs/", "wrong") == 403
    assert status(f"{dashboard}/api/jobs/", (shell.home / "ray_token").read_text()) == 200
    other = shell("submit", "run.yaml", "--address", dashboard, "--run-dir", "runs/run", RAY_AUTH_TOKEN="wrong")
    assert other.returncode == 2
    assert "refuses the token (from RAY_AUTH_TOKEN)" in other.stderr and "Traceback" not in other.stderr


def test_the_dashboard_is_for_this_machine_and_the_files_for_this_user(shell: Shell, dashboard: str):
    (record,) = [json.loads(path.read_bytes()) for path in (shell.home / "nodes").glob("*.json")]
    port = int(dashboard.rpartition(":")[2])
    family = [psutil.Process(record["pid"]), *psutil.Process(record["pid"]).children(recursive=True)]
    listening = {
        connection.laddr.ip
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}
    assert (shell.home / "ray_token").stat().st_mode & 0o777 == 0o600
    assert Path(f"/tmp/rlalign-{os.getuid()}").stat().st_mode & 0o777 == 0o700


def test_stop_ends_what_was_started_and_nothing_else(shell: Shell, dashboard: str):
    (record,) = [json.loads(path.read_bytes()) for path in (shell.home / "nodes").glob("*.json")]
    root = psutil.Process(record["pid"])
    family = [root, *root.children(recursive=True)]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "raylet"]) as bystander:
        assert shell("cluster", "status").stdout.startswith(f"head    {record['address']}")
        stopped = shell("cluster", "stop")
        assert f"stopped the head of {record['address']}" in stopped.stdout
        assert psutil.wait_procs(family, 10)[1] == []
        assert bystander.poll() is None
        bystander.kill()
    after = shell("submit", "run.yaml", "--address", dashboard, "--run-dir", "runs/run")
    assert after.returncode == 2 and "start one with `rlalign cluster start`" in after.stderr
