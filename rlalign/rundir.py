"""The run directory: where everything of a run stands, who owns it, and where to go on.

One command line starts a run, resumes it and, once it is finished, does nothing. ``open_run`` decides which it is:

    no run there                  -> start at step 0
    same config, not finished     -> go on from the last checkpoint, from step 0 when there is none
    same config, finished         -> ``Run.finished``: nothing to do; unless ``steps`` was raised, then it goes on
    another number of learners    -> a warning: the last bits of what follows differ
    another config                -> ValueError that names what differs
    fresh=True                    -> the old directory is renamed to NAME.old-1 (2, 3 ...), then start at step 0

"The same config" is the same ``confighash.hashed_part``: what decides the numbers. Where and how often things are
written, on which machines, and how many steps are asked for, may change between two starts.
"""

import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import ValidationError

from rlalign import checkpoint, machine
from rlalign.confighash import checkpoint_hash, differences, hash_of
from rlalign.files import in_words, locked, write_atomically
from rlalign.settings import Settings

logger = logging.getLogger(__name__)

Status = Literal["running", "interrupted", "failed", "finished"]
LOCK = ".rlalign-lock"
RESCUE = "use --fresh to move it aside, or --run-dir to choose another place"


class RunInfo(Settings):
    """run.json: what runs here, on what, and how it stands."""

    format: int = 1
    status: Status
    step: int
    """Updates done when the status was last written; a killed run has done more."""
    steps: int
    config_hash: str
    hashed: dict[str, Any]
    created: str
    updated: str
    command: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    git: str | None
    starts: list[dict[str, Any]]
    """Time, step, pid and command of every start."""


@dataclass(frozen=True, slots=True)
class RunDir:
    """The files of a run by name, whoever owns it."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def info(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def alarms(self) -> Path:
        return self.path / "alarms.jsonl"

    @property
    def spans(self) -> Path:
        return self.path / "spans.jsonl"

    @property
    def trace(self) -> Path:
        return self.path / "trace.json"

    @property
    def logs(self) -> Path:
        """One file a worker."""
        return self.path / "logs"

    @property
    def events(self) -> Path:
        return self.path / "events"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def workers(self) -> Path:
        return self.path / "workers.json"

    def sample(self, step: int) -> Path:
        """The picture grid of the weights after ``step`` updates."""
        return self.samples / f"{checkpoint.name_of(step)}.png"

    def read_config(self) -> dict[str, Any]:
        """The resolved config, all that ``resume`` needs; ValueError when there is no run or it is damaged."""
        try:
            config = yaml.safe_load(self._read(self.config))
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ValueError(f"{self.config} is damaged: it is not YAML") from None
        if not isinstance(config, dict) or not config:
            raise ValueError(f"{self.config} is damaged: it holds no config")
        return config  # pyright: ignore[reportUnknownVariableType]

    def read_info(self) -> RunInfo:
        """ValueError when there is no run or it is damaged."""
        try:
            return RunInfo.model_validate_json(self._read(self.info))
        except ValidationError:
            raise ValueError(f"{self.info} is damaged: it is not the JSON of a run; {RESCUE}") from None

    def _read(self, file: Path) -> bytes:
        with in_words(f"read {file}"):
            if not file.exists():
                raise ValueError(f"there is no run in {self.path}: it has no {file.name}")
            return file.read_bytes()


class Run:
    """A run directory that this process owns until it closes it, or dies."""

    def __init__(self, path: Path, info: RunInfo, step: int, checkpoint: Path | None, held: ExitStack) -> None:
        self.files = RunDir(path)
        self.info = info
        self.step = step
        """Updates done: where the loop goes on."""
        self.checkpoint = checkpoint
        """What to load before going on; None at step 0 and in a finished run."""
        self._held = held

    @property
    def finished(self) -> bool:
        return self.info.status == "finished"

    def mark(self, status: Status, step: int) -> None:
        """Records how the run stands after ``step`` updates."""
        self.info = self.info.model_copy(update={"status": status, "step": step, "updated": _now()})
        write_atomically(self.files.info, _json(self.info.model_dump()))

    def go_back(self) -> int:
        """To the last checkpoint, where the next recorder and loop begin; how many steps lie behind the last start."""
        before = self.step
        own = checkpoint_hash(self.info.hashed)
        self.step, self.checkpoint = checkpoint.latest(self.files.checkpoints, own) or (0, None)
        return self.step - before

    def write_workers(self, workers: Sequence[Mapping[str, Any]]) -> None:
        """Role, pid, node and version of every worker, for those who watch from outside."""
        write_atomically(self.files.workers, _json([dict(worker) for worker in workers]))

    def close(self) -> None:
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_run(
    path: Path, config: Mapping[str, Any], hashed: Mapping[str, Any], command: Sequence[str] = (), fresh: bool = False
) -> Run:
    """Takes the directory for this process and says where to go on: ``Run.step`` and ``Run.checkpoint``.

    ``config`` is the whole resolved config with ``steps`` at its top, ``hashed`` the part that decides the numbers.
    ValueError, one sentence, when the directory cannot be used. A finished run is left as it is.
    """
    files, steps = RunDir(path), int(config["steps"])
    with ExitStack() as stack:
        _occupy(path, stack)
        if fresh and (files.info.exists() or files.config.exists()):
            _move_aside(path)
            _occupy(path, stack)  # the old lock stays held too: a moment ago it was this path's
        old = files.read_info() if files.info.exists() else None
        if old is not None:
            _refuse_other_config(path, old, hashed)
            if old.status == "finished" and old.step == steps:
                return Run(path, old, steps, None, stack.pop_all())
        step, state = _where_to_go_on(files, old, steps, checkpoint_hash(hashed))
        run = Run(path, _started(old, hashed, steps, command, step), step, state, stack)
        _write_start(run, config)
        run._held = stack.pop_all()
        return run


def _occupy(path: Path, stack: ExitStack) -> None:
    """Makes the directory if need be and locks it; never touches a directory that is not ours."""
    with in_words(f"use {path} as a run directory"):
        blocker = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not blocker.is_dir():
            raise ValueError(f"cannot use {path} as a run directory: {blocker} is a file")
        path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
        if names and not names & {LOCK, "run.json"}:
            raise ValueError(f"{path} is not empty and holds no run; choose another place with --run-dir")
        stack.enter_context(locked(path / LOCK, f"{path} is in use by another process"))


def _move_aside(path: Path) -> None:
    free = next(name for n in range(1, 10**6) if not (name := path.with_name(f"{path.name}.old-{n}")).exists())
    with in_words(f"move {path} aside"):
        path.absolute().rename(free.absolute())
    logger.warning("the earlier run in %s is now %s", path, free)


def _refuse_other_config(path: Path, old: RunInfo, hashed: Mapping[str, Any]) -> None:
    if old.config_hash == hash_of(hashed):
        return
    changes = differences(old.hashed, hashed)
    if checkpoint_hash(old.hashed) == checkpoint_hash(hashed):
        logger.warning("%s: the last bits of this run's numbers differ from here on", ", ".join(changes))
        return
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    raise ValueError(f"{path} holds a run with another config ({', '.join(changes[:3])}{more}); {RESCUE}")


def _where_to_go_on(files: RunDir, old: RunInfo | None, steps: int, config_hash: str) -> tuple[int, Path | None]:
    checkpoint.sweep(files.path)
    checkpoint.sweep(files.checkpoints)
    step, path = checkpoint.latest(files.checkpoints, config_hash) or (0, None)
    done = max(step, old.step) if old is not None and old.status == "finished" else step
    if done > steps:
        raise ValueError(f"{files.path} already has {done} steps, more than the {steps} asked for; {RESCUE}")
    if done > step:
        raise ValueError(f"{files.path} is finished and its last checkpoint is gone, so it cannot go on; {RESCUE}")
    return step, path


def _started(old: RunInfo | None, hashed: Mapping[str, Any], steps: int, command: Sequence[str], step: int) -> RunInfo:
    now, versions, hardware, words = _now(), machine.versions(), machine.hardware(), shlex.join(command)
    if old is not None:
        _warn_of_changes(old.versions | old.hardware, versions | hardware)
    start = {"time": now, "step": step, "pid": os.getpid(), "command": words}
    return RunInfo(
        status="running",
        step=step,
        steps=steps,
        config_hash=hash_of(hashed),
        hashed=dict(hashed),
        created=old.created if old is not None else now,
        updated=now,
        command=words,
        versions=versions,
        hardware=hardware,
        git=machine.git_commit(),
        starts=[*(old.starts if old is not None else []), start],
    )


def _warn_of_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in ("rlalign", *machine.PACKAGES, "cpu", "gpus"):
        if before.get(name) != now.get(name):
            logger.warning("this run had %s %s, now %s: its numbers may differ", name, before.get(name), now.get(name))


def _write_start(run: Run, config: Mapping[str, Any]) -> None:
    """run.json comes last: with it the directory holds a run."""
    write_atomically(run.files.config, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True).encode())
    with in_words(f"use {run.files.path} as a run directory"):
        run.files.samples.mkdir(exist_ok=True)
        run.files.checkpoints.mkdir(exist_ok=True)
    run.mark("running", run.step)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
