"""A file that is replaced is the old one or the new one, never half of either."""

import resource
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from rlalign.files import in_words, locked, write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"^cannot write .*run.json: File too large$"):
            write_atomically(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(one.name, one.read_bytes()) for one in tmp_path.iterdir()] == [("run.json", b"old")]


def test_a_folder_that_is_not_there_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot write .*absent/run.json: No such file or directory"):
        write_atomically(tmp_path / "absent" / "run.json", b"new")
    with pytest.raises(ValueError, match="cannot look: odd"), in_words("look"):
        raise OSError("odd")


def test_a_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    def hold() -> AbstractContextManager[None]:
        return locked(tmp_path / "lock", "taken")

    with hold(), pytest.raises(ValueError, match=r"^taken \(process \d+ on "), hold():
        pass
    with hold():
        pass
