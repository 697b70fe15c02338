"""What comes over Ray's Jobs API: logs that arrive once, exit codes, and errors in words. The client is a stand-in."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import AuthenticationError

from rlalign.runtime import jobs
from rlalign.runtime.jobs import Jobs, Log, Unreachable, Upload

LOG = "one\ntwo\nthree\n"


class Client:
    """Ray's, with connections that break after so many characters."""

    def __init__(self, status: str = "SUCCEEDED", code: int | None = 0, breaks: tuple[int, ...] = ()) -> None:
        self.status, self.code, self.breaks = status, code, [*breaks]
        self.broken = 0
        self.fail: BaseException | None = None

    def job(self, name: str, status: str | None = None) -> Any:
        value = SimpleNamespace(value=status or self.status)
        return SimpleNamespace(
            submission_id=name, status=value, driver_exit_code=self.code, message="said Ray", metadata=None
        )

    def get_job_info(self, name: str) -> Any:
        if self.fail is not None:
            raise self.fail
        return self.job(name, "RUNNING" if self.breaks else None)

    def get_job_logs(self, name: str) -> str:
        return LOG

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        if not self.breaks:
            yield LOG
            return
        yield LOG[: self.breaks.pop(0)]
        self.broken += 1
        raise ConnectionResetError

    def list_jobs(self) -> list[Any]:
        return [self.job(name) for name in ("a-10", "a-2", "a-b-3", "raysubmit_x", "a-")]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)


def over(client: Client) -> Jobs:
    made = Jobs.__new__(Jobs)
    made.client, made.address = client, "http://h:8265"  # pyright: ignore[reportAttributeAccessIssue]
    return made


def test_a_log_that_comes_again_is_written_once():
    written: list[str] = []
    log = Log(written.append)
    for text in ("ab", "abcd", "a", "abcdef"):
        log.rewind()
        for part in text:
            log.add(part)
    assert "".join(written) == "abcdef"


@pytest.mark.parametrize("breaks", [(), (5,), (5, 2, 9), (0,)])
def test_a_lost_connection_is_made_again(breaks: tuple[int, ...]):
    written: list[str] = []
    client = Client(breaks=breaks)
    assert over(client).follow("a-1", written.append).code == 0
    assert "".join(written) == LOG and client.broken == len(breaks)


def test_a_cluster_that_went_away_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.0)
    client = Client()
    client.fail = ConnectionError("gone")
    with pytest.raises(Unreachable, match="no Ray cluster answers at http://h:8265; start one with"):
        over(client).follow("a-1", lambda text: None)


@pytest.mark.parametrize(
    ("status", "driver", "code", "why"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 2, 2, ""),
        ("FAILED", -9, 137, ""),
        ("FAILED", None, 1, "said Ray"),
        ("STOPPED", None, 143, "said Ray"),
    ],
)
def test_fates(status: str, driver: int | None, code: int, why: str):
    fate = over(Client(status, driver)).fate("a-1")
    assert fate is not None and (fate.status, fate.code, fate.why) == (status, code, why)


def test_a_job_that_runs_has_no_fate():
    assert over(Client("PENDING")).fate("a-1") is None


def test_attempts_of_a_run_in_their_order():
    assert [attempt.id for attempt in over(Client()).attempts("a")] == ["a-2", "a-10"]
    assert [attempt.id for attempt in over(Client()).attempts("a-b")] == ["a-b-3"]


def test_a_refused_token_and_anything_else_are_sentences():
    client = Client()
    client.fail = AuthenticationError("403")
    with pytest.raises(ValueError, match="refuses the token"):
        over(client).fate("a-1")
    client.fail = RuntimeError("Request failed\nwith 500")
    with pytest.raises(ValueError, match="the cluster at http://h:8265: Request failed with 500"):
        over(client).fate("a-1")


def test_nothing_but_env_vars_goes_along_without_a_folder():
    assert set(Upload(None).runtime_env()) == {"env_vars"}
