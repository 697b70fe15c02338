"""An environment of its own for a reward whose packages do not go with rlalign's, such as an older transformers.

rlalign is installed there without its dependencies, and of those only what a service needs, in one go with the reward's
packages, so that pip finds versions that suit all of them.
"""

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import rlalign

# Without bounds where the reward's packages may well have some of their own.
NEEDED = (
    *("torch", "numpy", "Pillow", "safetensors", "psutil", "PyYAML", "pydantic>=2.11", "httpx>=0.27"),
    *("typer>=0.26", "aiohttp>=3.13", "prometheus-client>=0.20"),
)
STAMP = "rlalign-reward.json"


def interpreter(venv: Path | None, packages: Sequence[str] | None) -> Path:
    """Of the environment that a reward names; made with ``packages``, below ~/.rlalign unless it says where.

    ValueError where there is none and no packages to make it with.
    """
    if packages is not None:
        folder = venv or _home() / "environments" / _name(packages)
        with _locked(folder):
            return python_of(folder, packages)
    assert venv is not None
    if not (python := _program(venv)).exists():
        raise ValueError(
            f"there is no interpreter {python}; make the environment first, or name its packages as "
            "pip: [...], and it is made"
        )
    return python


def python_of(folder: Path, packages: Sequence[str]) -> Path:
    """The interpreter of the environment in ``folder``, made or brought up to date if it has to be."""
    python = _program(folder)
    wanted = {"needed": [*NEEDED], "packages": [*packages], "rlalign": ourselves()}
    stamp = folder / STAMP
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return python
    if not python.exists():
        _run("make the environment", sys.executable, "-m", "venv", str(folder))
    stamp.unlink(missing_ok=True)  # of what is true no more as soon as pip begins
    pip = (str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet")
    _run("install the reward's packages", *pip, *wanted["needed"], *packages)
    _run("install rlalign", *pip, "--no-deps", *wanted["rlalign"])
    stamp.write_text(json.dumps(wanted))
    return python


def ourselves() -> list[str]:
    """What pip is told to install this very rlalign: the folder that it stands in, or the release."""
    source = Path(rlalign.__file__).parents[1]
    return ["-e", str(source)] if (source / "pyproject.toml").is_file() else [f"rlalign=={rlalign.__version__}"]


def _name(packages: Sequence[str]) -> str:
    """Others for other Pythons and other clones of rlalign, whose runs would take the environment from each other."""
    told = [[*packages], ourselves(), [*sys.version_info[:2]]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _program(folder: Path) -> Path:
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def _home() -> Path:
    return Path(os.environ.get("RLALIGN_HOME") or Path.home() / ".rlalign").expanduser().absolute()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One scorer of this machine makes it, the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(what: str, *command: str) -> None:
    print(f"{what}: {' '.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(command)
    if done.returncode != 0:
        raise ValueError(f"cannot {what}: {Path(command[0]).name} ended with exit code {done.returncode}, see above")
