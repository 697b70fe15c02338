"""submit: a run as a job of a Ray cluster, over its Jobs API. The same command again goes on with the run."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlalign.commands.problems import BadInput, in_preparation
from rlalign.config import RECIPES, find, load
from rlalign.runtime.jobs import Attempt, Fate, Jobs, Upload
from rlalign.runtime.processes import nodes

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ADDRESS = "RAY_API_SERVER_ADDRESS"  # as Ray's own commands read it
# Patterns as in .gitignore, which counts too, as Ray has it.
NEVER_UPLOADED = (
    ".git/", ".venv/", "venv/", "node_modules/", "__pycache__/", "*.pyc", "*.egg-info/", ".*_cache/", ".hypothesis/",
    ".ipynb_checkpoints/", "runs/", "wandb/", ".env", ".ssh/", ".aws/", ".rlalign/", ".ray/",
)  # fmt: skip
BAD_INPUT = 2  # as rlalign exits
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Wish:
    """The command line."""

    run_file: str
    overrides: Sequence[str] = ()
    address: str | None = None
    run_dir: Path | None = None
    working_dir: Path | None = None
    name: str | None = None
    exclude: Sequence[str] = ()
    pip: Sequence[str] = ()
    env: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is submitted, where, and under which name."""

    name: str
    address: str
    run_dir: Path
    entrypoint: str
    upload: Upload

    def again(self, wish: Wish) -> str:
        return shlex.join(["rlalign", "submit", wish.run_file, "--address", self.address, "--name", self.name])


def submit(wish: Wish, follow: bool = True, connect: Callable[[str], Jobs] = Jobs) -> int:
    """Submits the next attempt, or finds the one that is running; the exit code is that of the run."""
    with in_preparation():
        plan = planned(wish)
        jobs = connect(plan.address)
        attempts = jobs.attempts(plan.name)
        _refuse_other_run(plan, attempts)
        running = next((attempt for attempt in attempts if attempt.running), None)
        if running is not None:
            print(f"{running.id} is still running, with the settings it was submitted with", flush=True)
            attempt = running.id
        else:
            attempt = f"{plan.name}-{attempts[-1].number + 1 if attempts else 1}"
            if plan.upload.folder is not None:
                print(f"uploading     {plan.upload.folder}", flush=True)
            jobs.submit(attempt, plan.entrypoint, plan.upload, str(plan.run_dir))
            print(f"submitted     {attempt} to {plan.address}")
        print(f"run directory {plan.run_dir} (on the cluster's machines)")
        print(f"to stop it    {plan.again(wish)} --stop", flush=True)
        return _followed(jobs, attempt) if follow else 0


def stop(wish: Wish, connect: Callable[[str], Jobs] = Jobs) -> int:
    """Asks the attempt that is running to save and end."""
    with in_preparation():
        name, address = _name(wish), _address(wish)
        jobs = connect(address)
        running = [attempt for attempt in jobs.attempts(name) if attempt.running]
        for attempt in running:
            jobs.stop(attempt.id)
            print(f"asked {attempt.id} to stop: it finishes its step and saves")
        if not running:
            print(f"no attempt of {name} is running at {address}")
    return 0


def _followed(jobs: Jobs, attempt: str) -> int:
    try:
        fate = jobs.follow(attempt, _write)
    except KeyboardInterrupt:
        print(f"\n{attempt} goes on; the same command follows it again", file=sys.stderr)
        return 130
    print(_in_words(attempt, fate), file=sys.stderr if fate.code else sys.stdout)
    return fate.code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _in_words(attempt: str, fate: Fate) -> str:
    if fate.status == "SUCCEEDED":
        return f"{attempt} succeeded"
    if fate.status == "STOPPED":
        return f"{attempt} was stopped; the same command goes on from the last checkpoint"
    if fate.why:
        return f"{attempt} failed: {fate.why}; the same command goes on from the last checkpoint"
    if fate.code == BAD_INPUT:
        return f"{attempt} was refused; its last lines say what to change"
    return f"{attempt} failed with exit code {fate.code}; the same command goes on from the last checkpoint"


def planned(wish: Wish) -> Plan:
    """ValueError or BadInput for what can be told before anything is sent."""
    path = find(wish.run_file)
    config = load(path, wish.overrides)
    name, address = _name(wish), _address(wish)
    run_dir = _run_dir(wish, name, address)
    folder, run_file = _uploaded(wish, path)
    kept = config.model.memory.embeddings
    if folder is not None and kept is not None and kept.resolve().is_relative_to(folder):
        raise BadInput(
            f"model.memory.embeddings is {kept}, inside the folder that is uploaded: every machine would have its own, "
            "and none would outlive the job; name one that the machines share"
        )
    command = ["python", "-m", "rlalign", "train", run_file, "runtime.kind=ray", *wish.overrides]
    excludes = [*NEVER_UPLOADED, *wish.exclude]
    if folder is not None and run_dir.is_relative_to(folder):
        excludes.append(f"/{run_dir.relative_to(folder)}/")
    upload = Upload(folder, excludes, wish.pip, _env(wish.env))
    return Plan(name, address, run_dir, shlex.join([*command, "--run-dir", str(run_dir)]), upload)


def _name(wish: Wish) -> str:
    if wish.name is not None:
        if not NAME.fullmatch(wish.name):
            raise BadInput(f"{wish.name!r} cannot name a job; use letters, digits, and . _ - between them")
        return wish.name
    own = wish.run_dir.name if wish.run_dir is not None else Path(wish.run_file).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", own).strip(".-") or "run"


def _address(wish: Wish) -> str:
    """As given, or of the cluster that was started on this machine."""
    here = [node.dashboard for node in nodes() if node.dashboard]
    address = wish.address or os.environ.get(ADDRESS) or (here[0] if len(here) == 1 else DEFAULT_ADDRESS)
    if not address.startswith(("http://", "https://")):
        raise BadInput(f"--address {address} is not that of a dashboard, such as {DEFAULT_ADDRESS}")
    return address.rstrip("/")


def _run_dir(wish: Wish, name: str, address: str) -> Path:
    if wish.run_dir is not None:
        return wish.run_dir.expanduser().absolute()
    if address not in [node.dashboard for node in nodes()]:
        raise BadInput(
            f"the cluster at {address} was not started on this machine by rlalign cluster start, so name a folder that "
            f"its machines share, and that outlives them: --run-dir /shared/runs/{name}"
        )
    return Path("runs").absolute() / name


def _uploaded(wish: Wish, path: Path) -> tuple[Path | None, str]:
    """The folder that travels, and the run file as the job sees it."""
    if path.parent == RECIPES and not Path(wish.run_file).is_file():
        return wish.working_dir and wish.working_dir.expanduser().resolve(), path.stem
    folder = (wish.working_dir or path.parent).expanduser().resolve()
    if not path.resolve().is_relative_to(folder):
        raise BadInput(f"{path} is not inside {folder}, which is what the job sees; choose another --working-dir")
    return folder, str(path.resolve().relative_to(folder))


def _env(words: Sequence[str]) -> Mapping[str, str]:
    """NAME=VALUE, or NAME for the value that it has here."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals and name not in os.environ:
            raise BadInput(f"--env {name}: there is no variable {name} here; give it a value: --env {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    return found


def _refuse_other_run(plan: Plan, attempts: Sequence[Attempt]) -> None:
    for attempt in attempts:
        if attempt.running and attempt.run_dir not in (None, str(plan.run_dir)):
            raise BadInput(f"{attempt.id} is running in {attempt.run_dir}, another run; choose another --name")
