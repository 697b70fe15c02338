"""Runs as jobs of a cluster, over Ray's Jobs API. Attempt 3 of run NAME is the job NAME-3."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlalign.runtime import auth

RUN_DIR = "rlalign_run_dir"
OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's client prefers them to the address it is given
TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
STOP_WAIT_S = 600  # a stopped job may finish its step and save; Ray's own default is 3 s
DONE = ("SUCCEEDED", "FAILED", "STOPPED")
STOPPED, UNKNOWN = 143, 1
PATIENCE_S = 60.0  # with a cluster that does not answer


class Unreachable(ValueError):
    """Nobody answers."""


class Log:
    """Writes what is new of a text that comes several times, each time from its beginning."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write, self.written, self.read = write, 0, 0

    def rewind(self) -> None:
        self.read = 0

    def add(self, text: str) -> None:
        new = text[max(0, self.written - self.read) :]
        self.read += len(text)
        self.written = max(self.written, self.read)
        if new:
            self.write(new)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One job of a run."""

    id: str
    number: int
    status: str
    run_dir: str | None

    @property
    def running(self) -> bool:
        return self.status not in DONE


@dataclass(frozen=True, slots=True)
class Fate:
    """How a job ended."""

    status: str
    code: int
    why: str
    """What Ray says of a job whose command gave no exit code: it never ran, or its machine is gone."""


@dataclass(frozen=True, slots=True)
class Upload:
    """What a job sees besides what is installed on the cluster."""

    folder: Path | None
    excludes: Sequence[str] = ()
    pip: Sequence[str] = ()
    env: Mapping[str, str] | None = None

    def runtime_env(self) -> dict[str, Any]:
        made: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **(self.env or {})}}
        if self.folder is not None:
            made |= {"working_dir": str(self.folder), "excludes": list(self.excludes)}
        if self.pip:
            made["pip"] = list(self.pip)
        return made


class Jobs:
    """The jobs of the cluster whose dashboard is at ``address``; ValueError, one sentence, when nothing comes of it."""

    def __init__(self, address: str) -> None:
        auth.use_token()
        from ray.job_submission import JobSubmissionClient  # after the token mode, which Ray reads on import

        for name in TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        with _in_words(address), _without(OVERRIDING):
            self.client = JobSubmissionClient(address)

    def attempts(self, run: str) -> list[Attempt]:
        """Those of the run, oldest first."""
        with _in_words(self.address):
            jobs = self.client.list_jobs()
        found: list[Attempt] = []
        for job in jobs:
            name, _, number = (job.submission_id or "").rpartition("-")
            if name == run and number.isdigit():
                run_dir = (job.metadata or {}).get(RUN_DIR)
                found.append(Attempt(f"{name}-{number}", int(number), str(job.status.value), run_dir))
        return sorted(found, key=lambda attempt: attempt.number)

    def submit(self, attempt: str, entrypoint: str, upload: Upload, run_dir: str) -> None:
        with _in_words(self.address):
            self.client.submit_job(
                entrypoint=entrypoint,
                submission_id=attempt,
                runtime_env=upload.runtime_env(),
                metadata={RUN_DIR: run_dir},
            )

    def follow(self, attempt: str, write: Callable[[str], object]) -> Fate:
        """Writes the job's log from its beginning until the job ends; a connection that is lost is made again."""
        log, lost = Log(write), None
        while True:
            whole = asyncio.run(self._copy(attempt, log))
            try:
                fate = self.fate(attempt)
                lost = None
                if fate is not None and not whole:
                    log.rewind()
                    log.add(self.client.get_job_logs(attempt))
            except Unreachable:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > PATIENCE_S:
                    raise
                fate = None
            if fate is not None:
                return fate
            time.sleep(1.0)

    async def _copy(self, attempt: str, log: "Log") -> bool:
        """Whether the log came to its end."""
        import aiohttp

        log.rewind()  # it always comes from its beginning
        try:
            async for text in self.client.tail_job_logs(attempt):
                log.add(text)
        except BrokenPipeError:  # of whoever reads what is written here
            raise
        except (RuntimeError, OSError, aiohttp.ClientError):
            return False
        return True

    def fate(self, attempt: str) -> Fate | None:
        """None while the job is running."""
        with _in_words(self.address):
            job = self.client.get_job_info(attempt)
        status = str(job.status.value)
        if status not in DONE:
            return None
        why = "" if job.driver_exit_code is not None else " ".join((job.message or "").split())[:500]
        return Fate(status, _code(status, job.driver_exit_code), why)

    def stop(self, attempt: str) -> None:
        """Asks the job to end: it finishes its step, saves, and is killed if that takes longer than `STOP_WAIT_S`."""
        with _in_words(self.address):
            self.client.stop_job(attempt)


def _code(status: str, driver: int | None) -> int:
    """As a shell would say it, signals too."""
    if status == "SUCCEEDED":
        return 0
    code = STOPPED if status == "STOPPED" else driver or UNKNOWN
    return code if code > 0 else 128 - code


@contextmanager
def _in_words(address: str) -> Iterator[None]:
    """What Ray's client raises, as a sentence that says what to do."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError:
        raise ValueError(
            f"the cluster at {address} refuses the token (from {auth.source()}); copy the cluster's token to "
            f"{auth.token_file()}, or name its file in {auth.TOKEN_PATH}"
        ) from None
    except OSError as error:  # requests' errors are OSErrors, as is ConnectionError
        raise Unreachable(
            f"no Ray cluster answers at {address}; start one with `rlalign cluster start`, or forward the port of "
            "its dashboard to this machine (cluster/README.md)"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"the cluster at {address}: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
