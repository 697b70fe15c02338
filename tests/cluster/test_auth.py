"""Whose token is used, and that nobody else can read it. Nothing here needs Ray."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlalign.runtime import auth

MODE, TOKEN, TOKEN_PATH = auth.MODE, auth.TOKEN, auth.TOKEN_PATH


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(auth.HOME, raising=False)
    return tmp_path


def used(**given: str) -> dict[str, str]:
    environment = dict(given)
    auth.use_token(environment)
    return environment


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_token_mode_is_set_and_a_token_made(own_home: Path):
    path = own_home / ".rlalign" / "ray_token"
    assert used() == {MODE: "token", TOKEN_PATH: str(path)}
    assert len(path.read_text()) == 64 and int(path.read_text(), 16)
    assert (mode_of(path), mode_of(path.parent)) == (0o600, 0o700)
    assert list(path.parent.iterdir()) == [path]


def test_whatever_the_umask_nobody_else_reads_it(own_home: Path):
    before = os.umask(0)
    try:
        used()
    finally:
        os.umask(before)
    assert mode_of(auth.token_file()) == 0o600


def test_the_token_stays():
    used()
    token = auth.token_file().read_text()
    used()
    auth.create(auth.token_file())  # somebody else was first
    assert auth.token_file().read_text() == token


def test_it_lies_where_RLALIGN_HOME_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(auth.HOME, str(tmp_path / "elsewhere"))
    assert used()[TOKEN_PATH] == str(tmp_path / "elsewhere" / "ray_token")


def test_what_the_user_set_is_respected(tmp_path: Path):
    own = tmp_path / "own"
    own.write_text("mine")
    own.chmod(0o600)
    assert used(**{MODE: "disabled"}) == {MODE: "disabled"}
    assert used(**{TOKEN: "abc"}) == {MODE: "token", TOKEN: "abc"}
    assert used(**{TOKEN_PATH: str(own)}) == {MODE: "token", TOKEN_PATH: str(own)}
    assert used(**{TOKEN: "abc", TOKEN_PATH: str(own)})[TOKEN] == "abc"
    assert not auth.token_file().exists()


def test_rays_own_token_that_others_can_read_is_not_picked_up(own_home: Path):
    rays = own_home / ".ray" / "auth_token"
    rays.parent.mkdir()
    rays.write_text("rays")
    assert used(**{MODE: "token"})[TOKEN_PATH] == used()[TOKEN_PATH] == str(auth.token_file())


def test_a_token_that_others_could_read_is_closed_and_told(caplog: pytest.LogCaptureFixture):
    used()
    auth.token_file().chmod(0o644)
    with caplog.at_level(logging.WARNING):
        used()
    assert mode_of(auth.token_file()) == 0o600
    assert "could be read by others" in caplog.text and auth.token_file().read_text() not in caplog.text


def test_somebody_elses_file_is_left_as_it_is_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    own = tmp_path / "own"
    own.write_text("mine")
    own.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        used(**{TOKEN_PATH: str(own)})
    assert mode_of(own) == 0o644 and "every user of this machine" in caplog.text


@pytest.mark.parametrize("contents", ["", " \n"])
def test_an_empty_token_is_refused(contents: str):
    used()
    auth.token_file().write_text(contents)
    with pytest.raises(ValueError, match="is empty"):
        used()


def test_a_token_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="No such file"):
        used(**{TOKEN_PATH: str(tmp_path / "none")})


def test_messages_name_the_source_and_never_the_token():
    assert auth.source({MODE: "token", TOKEN: "secret"}) == TOKEN
    assert auth.source(used()) == str(auth.token_file())
    assert auth.source({}) == f"none, since {MODE} is not set"


def test_a_ray_that_was_imported_before_is_told(own_home: Path):
    """Ray reads its mode once, on import; without being told it would connect without a token."""
    show = (
        "import ray\n"
        "from rlalign.runtime.auth import use_token\n"
        "use_token()\n"
        "from ray._private.authentication.authentication_utils import is_token_auth_enabled\n"
        "from ray._raylet import AuthenticationTokenLoader as Loader\n"
        "print(is_token_auth_enabled(), Loader.instance().get_token_for_http_header()['authorization'])"
    )
    env = {k: v for k, v in os.environ.items() if k not in (MODE, TOKEN, TOKEN_PATH)}
    done = subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "Bearer", auth.token_file().read_text()]
