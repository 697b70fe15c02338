"""Files that are either whole or not there."""

import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

logger = logging.getLogger(__name__)


@contextmanager
def in_words(deed: str) -> Iterator[None]:
    """What the disk refuses while we ``deed`` becomes one sentence for the user."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot {deed}: {error.strerror or error}") from error


def write_durably(path: Path, data: bytes) -> None:
    """Returns when the bytes are on the disk; until then the file may be half there."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Replaces the file at once: a reader, or a kill at any moment, meets the old bytes or the new ones."""
    temporary = path.with_name(f".tmp-{path.name}-{uuid4().hex}")  # other machines have the same process ids
    with in_words(f"write {path}"):
        try:
            write_durably(temporary, data)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Names are data of the folder: a rename lasts once the folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[None]:
    """Holds the file's lock, which ends with the process however it dies; ValueError when another one holds it."""
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{refusal} ({file.read().strip() or 'unknown'})") from None
        except OSError as error:  # some cluster file systems have no locks
            logger.warning("cannot lock %s (%s): make sure that nothing else uses it", path, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
