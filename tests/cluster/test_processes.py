"""Only what was started here is ended: pids are compared with start times. Nothing here needs Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from rlalign.runtime import auth, processes
from rlalign.runtime.processes import Node, nodes, start_head, start_worker, stop

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(auth.HOME, str(tmp_path))
    for name in (auth.MODE, auth.TOKEN, auth.TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "nodes").mkdir()
    return tmp_path


@pytest.fixture
def sleeper() -> "Iterator[subprocess.Popen[str]]":
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        yield process
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def recorded(pid: int) -> Node:
    created = psutil.Process(pid).create_time()
    node = Node("head", "127.0.0.1:1", None, pid, created, os.uname().nodename, "log")
    node.record.write_text(json.dumps(asdict(node)))
    return node


def test_a_node_is_ended_with_all_that_descends_from_it(sleeper: "subprocess.Popen[str]"):
    assert sleeper.stdout is not None
    child = psutil.Process(int(sleeper.stdout.readline()))
    node = recorded(sleeper.pid)
    assert nodes() == [node]
    stop(node)
    assert sleeper.wait(10) is not None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert nodes() == [] and not node.record.exists()


def test_what_outlives_its_parent_is_ended_too(sleeper: "subprocess.Popen[str]"):
    assert sleeper.stdout is not None
    child = psutil.Process(int(sleeper.stdout.readline()))
    node = recorded(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert nodes() == [node] and child.is_running()
    stop(node)
    assert not child.is_running() and nodes() == []


def test_a_pid_that_is_another_process_by_now_is_left_alone(sleeper: "subprocess.Popen[str]"):
    node = recorded(sleeper.pid)
    node.record.write_text(json.dumps(asdict(replace(node, created=node.created - 100))))
    stop(replace(node, created=node.created - 100))
    time.sleep(0.2)
    assert sleeper.poll() is None


def test_records_of_the_dead_and_damaged_ones_are_removed(own_home: Path, sleeper: "subprocess.Popen[str]"):
    dead = recorded(sleeper.pid)
    os.killpg(sleeper.pid, signal.SIGKILL)
    sleeper.wait()
    (own_home / "nodes" / f"{os.uname().nodename}-1.json").write_text("{")
    other = own_home / "nodes" / "another-machine-1.json"
    other.write_text("{")
    assert nodes() == [] and not dead.record.exists()
    assert list((own_home / "nodes").iterdir()) == [other]  # home may be on storage that machines share


def test_a_wide_dashboard_without_a_token_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(auth.MODE, "disabled")
    with pytest.raises(ValueError, match=r"a dashboard on 0\.0\.0\.0 without a token"):
        start_head(None, "0.0.0.0", None, [], [])


def test_nor_can_it_be_slipped_in():
    with pytest.raises(ValueError, match="cannot be handed through"):
        start_head(None, "127.0.0.1", None, [], ["--dashboard-host=0.0.0.0"])


@pytest.mark.parametrize(
    ("address", "words"), [("nonsense", "is no address"), ("127.0.0.1:1", "no Ray cluster answers")]
)
def test_joining_what_is_not_there(address: str, words: str):
    with pytest.raises(ValueError, match=words):
        start_worker(address, [], [])


def test_what_fails_to_start_says_why_and_leaves_nothing():
    with pytest.raises(ValueError, match=r"Ray did not start: .*--no-such-option"):
        start_head(0, "127.0.0.1", 0, [], ["--no-such-option"])
    assert nodes() == []


def test_a_port_in_use_is_named(sleeper: "subprocess.Popen[str]"):

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is in use; choose another --port"):
            start_head(port, "127.0.0.1", None, [], [])
        assert processes._port("", None, port) != port
