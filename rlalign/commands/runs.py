"""Runs as other commands see them: where they lie, their config, their trained weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from rlalign import checkpoint, runfile
from rlalign.build import load_policy
from rlalign.config import RunConfig, find, load, resolve
from rlalign.policy import Policy
from rlalign.rundir import RunDir

Weights = Literal["policy", "ema"]


@dataclass(frozen=True, slots=True)
class Trained:
    """A run's model as its newest sound checkpoint has it."""

    policy: Policy
    weights: Weights
    step: int


def config_of_run(folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that the run in ``folder`` resolved to, with overrides applied."""
    return resolve(RunDir(folder).read_config(), folder, "config.yaml", runfile.parse(overrides))


def config_of(target: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Of a run's folder, or of a run file or recipe."""
    return config_of_run(Path(target), overrides) if is_run(target) else load(find(target), overrides)


def is_run(target: str) -> bool:
    return Path(target).is_dir()


def newest(folder: Path) -> tuple[int, Path]:
    """The updates done and where their sound checkpoint is; ValueError when there is none."""
    found = checkpoint.latest(RunDir(folder).checkpoints)
    if found is None:
        raise ValueError(f"{folder} has no checkpoint yet")
    return found[0], found[1].absolute()


def trained(folder: Path, config: RunConfig, wanted: Weights | None = None) -> Trained:
    """The run's model with ``wanted`` weights: the average if one is kept, else the policy, unless said otherwise."""
    step, path = newest(folder)
    kept = {} if wanted == "policy" else _read(path, "ema")
    if wanted == "ema" and not kept:
        raise ValueError(f"{folder} keeps no ema; use --weights policy, or train with ema={{decay: 0.9, every: 8}}")
    weights: Weights = "ema" if kept else "policy"
    policy = load_policy(config)
    policy.load(weights, kept or _read(path, "policy"))
    return Trained(policy, weights, step)


def _read(path: Path, weights: Weights) -> dict[str, Tensor]:
    """Without moments and masters, which take several times as much."""
    return checkpoint.read_part(path, checkpoint.LEARNER, only=f"{weights}/").part(weights).tensors
