"""Checkpoints: directories that are either whole or not there.

``checkpoints/step_000010`` holds the state after 10 updates: one safetensors file for each first component of the
tensors' names (``policy/...`` -> policy.safetensors), ``state.json`` with the plain values, and ``manifest.json`` with
the size and SHA-256 of all. It is written under another name, synced and renamed, so that a kill at any moment leaves
the earlier checkpoints as they were; the newest one is found by checking it, never by a pointer that can go stale.

What the learner ranks hold is a part of its own, which they write and read themselves: ``learner.json`` with
``learner.safetensors``, or with a folder ``learner`` of safetensors where each rank wrote its parts of sharded weights
(torch.distributed.checkpoint). Either is read by any number of ranks. Nothing anywhere is pickled.

``State.values`` goes through JSON: floats, integers, NaN and infinities come back exactly, tuples come back as lists,
and keys must be strings. Local folders only; an upload to a URL belongs after the rename, manifest last.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from pydantic import PositiveInt, ValidationError
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from rlalign import __version__, sharding
from rlalign.files import in_words, sync_folder, write_durably
from rlalign.settings import Settings
from rlalign.types import State

logger = logging.getLogger(__name__)

FORMAT = 2
NAME = re.compile(r"step_(\d{6,})")
MANIFEST, VALUES, UNGROUPED = "manifest.json", "state.json", "other"
LEARNER = "learner"
"""The part that the learner ranks write and read: it may be too large for any other process."""


class CheckpointConfig(Settings):
    """When to save, and what stays on the disk."""

    every: PositiveInt = 10
    """Steps between two checkpoints; the last step always gets one."""
    keep: PositiveInt = 3
    """How many of the newest to keep."""
    keep_best: str | None = None
    """Also keep the checkpoint with the highest value of this metric, say eval/reward/mean; null: only the newest.
    With max_staleness only eval/... is of the checkpoint's own weights."""


class FileRecord(Settings):
    bytes: int
    sha256: str


Files = dict[str, FileRecord]
"""By path within the checkpoint."""


class Manifest(Settings):
    """Written last: with it the directory is a checkpoint, without it it is rubbish."""

    format: int
    step: int
    config_hash: str
    versions: dict[str, str]
    files: Files


def save(
    folder: Path,
    step: int,
    state: State,
    keep: int,
    config_hash: str,
    scores: Mapping[int, float] | None = None,
    others: Callable[[Path], Files] = lambda folder: {},
) -> Path:
    """Commits the state after ``step`` updates and drops all but the ``keep`` newest and the best of ``scores``.

    ``scores`` maps steps to a metric, higher is better. ``others`` writes parts that this process does not hold into
    the folder it is given, durably, and says what it wrote. A sound checkpoint of this step is left as it is. Returns
    once the checkpoint is on the disk; ValueError, with the earlier ones untouched, when the disk refuses.
    """
    target = folder / name_of(step)
    if target.exists() and fault(target, config_hash) is None:
        return target
    temporary = folder / f".tmp-{step}-{os.getpid()}"
    try:
        with in_words(f"save checkpoint {target.name} in {folder}, the earlier ones are untouched"):
            _write(temporary, step, state, config_hash, others)
            if target.exists():
                _discard(target)
            temporary.rename(target)
            sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already unless something failed
    _prune(folder, step, keep, scores or {})
    return target


def load(path: Path, without: str | None = None) -> State:
    """The saved state on the CPU, or all but one part; ValueError names what is broken."""
    problem = fault(path)
    if problem is not None:
        raise ValueError(f"checkpoint {path} is broken: {problem}")
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = json.loads((path / VALUES).read_bytes())
    files = read_manifest(path).files
    for name in dict.fromkeys(re.split(r"[./]", file)[0] for file in files if file != VALUES):
        if name == without:
            continue
        tensors |= _read_tensors(path, name, {})
        if f"{name}.json" in files:
            values[name] = json.loads((path / f"{name}.json").read_bytes())
    return State(tensors, values)


def read_part(path: Path, name: str, like: Mapping[str, Tensor] | None = None, only: str = "") -> State:
    """A part that ``write_part`` or ``write_sharded`` wrote, of a checkpoint that is known to be sound.

    On the CPU, and whole but where ``like`` has a sharded tensor under the name: then only this rank's part is read.
    Of the tensors those whose names within the part begin with ``only``.
    """
    tensors = _read_tensors(path, name, {f"{name}/{key}": tensor for key, tensor in (like or {}).items()}, only)
    return State(State(tensors).part(name).tensors, json.loads((path / f"{name}.json").read_bytes()))


def _read_tensors(path: Path, name: str, like: Mapping[str, Tensor], only: str = "") -> dict[str, Tensor]:
    if (path / name).is_dir():
        return sharding.load(path / name, f"{name}/{only}", like)
    if like:
        return sharding.load(path, f"{name}/{only}", like)
    file = path / f"{name}.safetensors"
    if not file.exists():
        return {}
    # Cloned: the file is mapped into memory, and may be pruned while the state is still in use.
    with safe_open(file, "pt") as tensors:
        names: list[str] = tensors.keys()
        wanted = [key for key in names if not only or key.startswith(f"{name}/{only}")]
        return {key: tensors.get_tensor(key).clone() for key in wanted}


def latest(folder: Path, config_hash: str | None = None) -> tuple[int, Path] | None:
    """The newest sound checkpoint and its step, None when there is none yet; broken ones are named and skipped.

    ValueError when there are some and all are broken: starting over by itself would throw days away.
    """
    broken: list[str] = []
    for step, path in reversed(committed(folder)):
        problem = fault(path, config_hash)
        if problem is None:
            for words in broken:
                logger.warning("%s; using %s", words, path.name)
            return step, path
        broken.append(f"checkpoint {path.name} is broken: {problem}")
    if broken:
        raise ValueError(f"no checkpoint in {folder} can be used ({'; '.join(broken)}); delete them to begin at step 0")
    return None


def fault(path: Path, config_hash: str | None = None) -> str | None:
    """What is wrong with a checkpoint, None when it is sound (and of that config, if one is given)."""
    try:
        manifest = read_manifest(path)
        if NAME.fullmatch(path.name) and path.name != name_of(manifest.step):
            return f"its manifest says step {manifest.step}"
        if manifest.format != FORMAT:
            return f"it is of format {manifest.format}, and this version reads {FORMAT}"
        if config_hash is not None and manifest.config_hash != config_hash:
            return f"it was made under another config ({manifest.config_hash[:12]}, not {config_hash[:12]})"
        faults = (_file_fault(path / name, record) for name, record in manifest.files.items())
        return next((words for words in faults if words is not None), None)
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except ValidationError:
        return f"{MANIFEST} makes no sense"


def read_manifest(path: Path) -> Manifest:
    return Manifest.model_validate_json((path / MANIFEST).read_bytes())


def committed(folder: Path) -> list[tuple[int, Path]]:
    """Every checkpoint that was renamed into place, sound or not, oldest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name)))


def sweep(folder: Path) -> None:
    """Removes what a killed process left half-written or half-deleted. Only the run's owner may call this."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith((".tmp-", ".del-")) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(".tmp-"):
            path.unlink()


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def write_part(folder: Path, name: str, state: State) -> Files:
    """NAME.json and NAME.safetensors, if there are tensors."""
    files: Files = {}
    if state.tensors:
        tensors = {f"{name}/{key}": tensor for key, tensor in state.tensors.items()}
        _put(folder, f"{name}.safetensors", to_safetensors(_grouped(tensors)[name]), files)
    _put(folder, f"{name}.json", _to_json(state.values), files)
    return files


def write_sharded(folder: Path, name: str, state: State, rank: int) -> Files:
    """The same by all ranks of a group: each writes its parts of the tensors into the folder NAME."""
    sharding.save(folder / name, {f"{name}/{key}": tensor for key, tensor in state.tensors.items()})
    files = {f"{name}/{path.name}": _record_of(path) for path in sharding.files_of(folder / name, rank)}
    sync_folder(folder / name)
    if rank == 0:
        _put(folder, f"{name}.json", _to_json(state.values), files)
    return files


def _write(folder: Path, step: int, state: State, config_hash: str, others: Callable[[Path], Files]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of a process that had our pid
    folder.mkdir(parents=True)
    files = others(folder.absolute())
    _refuse_unseen(folder, files)
    for group, tensors in _grouped(state.tensors).items():
        _put(folder, f"{group}.safetensors", to_safetensors(tensors), files)
    _put(folder, VALUES, _to_json(state.values), files)
    versions = {"rlalign": __version__, "torch": torch.__version__}
    manifest = Manifest(format=FORMAT, step=step, config_hash=config_hash, versions=versions, files=files)
    write_durably(folder / MANIFEST, manifest.model_dump_json(indent=2).encode())
    sync_folder(folder)


def _refuse_unseen(folder: Path, files: Files) -> None:
    """What other processes wrote has to be here, or the checkpoint would be found broken when it is needed."""
    for name, record in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record.bytes:
            raise ValueError(f"{path} is not what a learner wrote: the run directory must be on a disk that all share")


def _put(folder: Path, name: str, data: bytes, files: Files) -> None:
    """The hash is of the bytes as they were meant, not as the disk gives them back."""
    files[name] = FileRecord(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_durably(folder / name, data)


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        group = name.split("/")[0] if "/" in name else UNGROUPED
        # A copy of its own: safetensors refuses views and shared storage, and the original may be on a GPU.
        groups[group][name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return groups


def _to_json(values: Mapping[str, Any]) -> bytes:
    _refuse_other_keys(values, "values")
    return json.dumps(values).encode()


def _refuse_other_keys(value: Any, where: str) -> None:
    """JSON would turn the key 3 into "3" without a word, and a resumed run would not find it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():  # pyright: ignore[reportUnknownVariableType]
            if not isinstance(key, str):
                raise TypeError(f"State.{where} has the key {key!r}: only strings come back from JSON as they were")
            _refuse_other_keys(inner, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for inner in value:  # pyright: ignore[reportUnknownVariableType]
            _refuse_other_keys(inner, where)


def _file_fault(path: Path, record: FileRecord) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    size = path.stat().st_size
    if size != record.bytes:
        return f"{path.name} has {size} bytes instead of {record.bytes}"
    return None if _record_of(path) == record else f"{path.name} has the wrong SHA-256"


def _record_of(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _prune(folder: Path, step: int, keep: int, scores: Mapping[int, float]) -> None:
    """Later steps than this one go too: the run was resumed before them, so they are broken."""
    found = dict(committed(folder))
    past = [known for known in found if known <= step]
    scored = [known for known in past if not math.isnan(scores.get(known, math.nan))]
    best = max(scored, key=lambda known: scores[known], default=None)
    for known in found.keys() - {*past[-keep:], best}:
        try:
            _discard(found[known])
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s: %s", found[known], error.strerror)


def _discard(path: Path) -> None:
    """Renamed first, so that no half-deleted checkpoint is ever seen under its name."""
    condemned = path.with_name(f".del-{path.name}-{uuid4().hex[:8]}")
    path.rename(condemned)
    shutil.rmtree(condemned, ignore_errors=True)
