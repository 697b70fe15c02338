"""The whole service, with worker processes that raise, hang and die: nothing is lost, nothing is scored twice."""

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rlalign import cli
from rlalign.scoring import RewardConfig, load_reward, wire
from rlalign.types import Prompt
from tests.serving.rewards import numbered
from tests.serving.services import FILE, Running, service, wait_for

pytestmark = pytest.mark.xdist_group("reward service")

TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    """Two workers that give up a call after 5 s."""
    (folder / "token").write_text(TOKEN)
    token = ("--token-file", str(folder / "token"))
    with service(folder, "Counted", f"folder={folder}", "--workers", "2", *token, "--set", "timeout_s=5") as found:
        yield found


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)


def client(running: Running, **options: Any) -> Any:
    own = {"token_env": "REWARD_TOKEN"} | options
    return load_reward(RewardConfig(use=running.url, timeout_s=30.0, options=own)).function


def post(running: Running, numbers: list[int], text: str = "a cat", **headers: str) -> httpx.Response:
    body = wire.as_json(numbered(numbers), [Prompt(text)] * len(numbers))
    own = {"Content-Type": wire.JSON, "Authorization": f"Bearer {TOKEN}"} | headers
    return httpx.post(running.url, content=body, headers=own, timeout=30.0, trust_env=False)


def count(folder: Path) -> Counter[int]:
    """How often each picture was scored."""
    return Counter(int(line) for line in (folder / "scored").read_text().splitlines())


def test_a_thousand_pictures_one_worker_killed_midway_none_lost_none_twice(running: Running, folder: Path):
    """The worker that is killed is in the midst of a call, of which it has counted nothing."""
    ask = client(running)
    requests = [list(range(start, start + 5)) for start in range(0, 1000, 5)]

    def scored(numbers: list[int]) -> dict[str, Any]:
        text = "hang once" if 500 in numbers else "a cat"
        return ask(numbered(numbers), [Prompt(text)] * len(numbers))

    def kill() -> None:
        wait_for((folder / "hanging").exists)
        os.kill(int((folder / "hanging").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(scored, requests))
    killer.join()
    assert [number for answer in answers for number in answer["score"]] == list(range(1000))
    assert count(folder) == Counter(range(1000))
    pids = {pid for answer in answers for pid in answer["pid"]}
    assert len(pids) >= 2
    assert max(size for answer in answers for size in answer["together"]) > 5  # requests shared calls

    assert scored(requests[0]) == answers[0]  # sent again, as after a lost connection
    assert count(folder) == Counter(range(1000))


def test_a_reward_that_raises_is_told_in_one_sentence(running: Running):
    response = post(running, [2001], "raise")
    assert response.status_code == 500
    assert response.text == "the reward failed: ValueError: this picture is ugly (rewards.py, line 45)\n"


def test_the_good_do_not_suffer_for_the_bad(running: Running, folder: Path):
    """Some of these share a call with the bad one."""
    texts = ["a cat", "raise", "a cat", "a cat"]
    with ThreadPoolExecutor(4) as threads:
        codes = [*threads.map(lambda n: post(running, [2100 + n], texts[n]).status_code, range(4))]
    assert codes == [200, 500, 200, 200]
    assert all(count(folder)[2100 + n] == 1 for n in (0, 2, 3))


def test_a_request_that_kills_every_worker_is_given_up_and_no_other(running: Running, folder: Path):
    with ThreadPoolExecutor(3) as threads:
        bad = threads.submit(post, running, [2200], "die")
        good = [threads.submit(post, running, [number]) for number in (2201, 2202)]
    assert bad.result().status_code == 500
    assert "this request ended 3 worker processes" in bad.result().text
    assert [one.result().json()["score"] for one in good] == [[2201], [2202]]
    assert count(folder)[2201] == count(folder)[2202] == 1


def test_what_a_dead_worker_had_started_goes_with_it(running: Running, folder: Path):
    assert "this request ended 3 worker processes" in post(running, [2210], "fork and die").text
    helpers = [int(pid) for pid in (folder / "helpers").read_text().split()]
    assert len(helpers) == 3
    wait_for(lambda: not any(psutil.pid_exists(pid) and not zombie(pid) for pid in helpers))


def zombie(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_call_that_hangs_is_given_up_and_its_worker_replaced(running: Running):
    response = post(running, [2300], "hang")
    assert response.status_code == 504
    assert response.text.startswith("the reward failed: no answer within 5 s")
    assert post(running, [2301]).json()["score"] == [2301]


def test_a_request_that_is_sent_again_while_it_is_scored_is_scored_once(running: Running, folder: Path):
    (folder / "go").unlink(missing_ok=True)
    with ThreadPoolExecutor(2) as threads:
        key = {"Idempotency-Key": "the same"}
        first = threads.submit(post, running, [2400], "wait", **key)
        wait_for((folder / "waiting").exists)
        again = threads.submit(post, running, [2400], "wait", **key)
        (folder / "go").touch()
    assert first.result().json() == again.result().json()
    assert count(folder)[2400] == 1


def test_a_video_and_what_it_is_made_from_arrive(running: Running):
    video = numbered([7, 7, 7]).reshape(1, 3, 3, 8, 8).expand(2, -1, -1, -1, -1)
    prompts = [Prompt("a cat", image=video[0, 0]), Prompt("a dog", video=video[0])]
    assert client(running, format="safetensors")(video, prompts)["score"] == [7, 7]
    assert client(running)(video, prompts)["score"] == [7, 7]


def test_a_wrong_token_is_refused(running: Running, monkeypatch: pytest.MonkeyPatch):
    assert httpx.get(running.url.replace("/Counted", "/health"), trust_env=False).json()["status"] == "ok"
    assert post(running, [1], Authorization="Bearer wrong").status_code == 401
    monkeypatch.setenv("REWARD_TOKEN", "something else")
    with pytest.raises(Exception, match="answered 401 Unauthorized: the token is wrong"):
        client(running)(numbered([1]), [Prompt("a cat")])
    assert (running.out.parent / "token").stat().st_mode & 0o777 == 0o600
    assert TOKEN not in running.out.read_text() + running.err.read_text()


def test_what_was_accepted_is_finished_and_nothing_else(tmp_path: Path):
    with service(tmp_path, "Counted", f"folder={tmp_path}") as running, ThreadPoolExecutor(1) as threads:
        accepted = threads.submit(post, running, [1], "wait")
        wait_for((tmp_path / "waiting").exists)
        workers = psutil.Process(running.process.pid).children(recursive=True)
        running.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(running.url.replace("/Counted", "/health"), trust_env=False).status_code == 503)
        late = post(running, [2])
        (tmp_path / "go").touch()
        assert late.status_code == 503 and late.headers["Retry-After"] == "5"
        assert late.text == "the server is ending and takes nothing new\n"
        assert accepted.result().json()["score"] == [1]
        assert running.process.wait(30) == 0
        assert workers and not any(worker.is_running() for worker in workers)
        assert count(tmp_path) == {1: 1}


def test_a_reward_that_cannot_be_loaded_ends_it_with_a_sentence(capsys: pytest.CaptureFixture[str]):
    assert cli.run(["serve-reward", f"{FILE}:Broken", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("rlalign: reward 'Broken': Broken cannot be constructed with no options: FileNotFoundError")
    assert said.count("\n") == 1


def test_workers_do_not_outlive_a_front_that_is_killed(running: Running):
    """The last one here, since nobody serves after it."""
    workers = psutil.Process(running.process.pid).children(recursive=True)
    running.process.kill()
    running.process.wait()
    assert workers
    wait_for(lambda: not any(worker.is_running() for worker in workers))
