"""What a run ran on: versions, hardware and the commit of the folder it was started in."""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from rlalign import __version__

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "ray")


def versions() -> dict[str, str]:
    """Versions of all that can change the numbers, read without importing anything."""
    found = {"rlalign": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Host, processor, memory and GPUs."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": _gpu_names(),
    }


def git_commit() -> str | None:
    """The commit checked out in the working directory, with +changes when tracked files differ from it."""
    commit = _output("git", "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_names() -> list[str]:
    """Asked of the driver, since torch would open a context on a GPU that belongs to a worker."""
    if shutil.which("nvidia-smi") is None:
        return []
    return (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
