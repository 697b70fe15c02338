"""Ray's token mode, set explicitly for everything that starts or joins a cluster: Ray's own default depends on how it
is started, and on whether somebody made a token before. So is the token, which Ray would leave readable by all.

What Ray 2.60 reads, when token mode is on, is RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else
~/.ray/auth_token; its mode it reads once, on import. Every client sends the token by itself, that of the Jobs API too.
"""

import logging
import os
import secrets
import stat
import sys
from collections.abc import MutableMapping
from pathlib import Path

logger = logging.getLogger(__name__)

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
HOME = "RLALIGN_HOME"


def home() -> Path:
    """Where this user's token and the records of started clusters lie."""
    return Path(os.environ.get(HOME) or Path.home() / ".rlalign").expanduser().absolute()


def token_file() -> Path:
    return home() / "ray_token"


def use_token(environment: MutableMapping[str, str] | None = None) -> None:
    """Token mode for this process and its children, or as the user has set RAY_AUTH_MODE, _TOKEN or _TOKEN_PATH.

    ValueError when there is no usable token. Nothing here needs Ray; where it is imported already, it is told.
    """
    target = os.environ if environment is None else environment
    chosen, named = target.get(MODE), target.get(TOKEN_PATH)
    if chosen is not None and chosen.lower() != "token":
        return
    target[MODE] = "token"
    if not target.get(TOKEN):
        target[TOKEN_PATH] = str(_file_to_use(named))
    if target is os.environ and (chosen, named) != (target[MODE], target.get(TOKEN_PATH)):
        _tell_ray()


def is_on(environment: MutableMapping[str, str]) -> bool:
    return environment.get(MODE, "").lower() == "token"


def source(environment: MutableMapping[str, str] | None = None) -> str:
    """Where the token comes from, for messages; never the token."""
    target = os.environ if environment is None else environment
    if not is_on(target):
        return f"none, since {MODE} is {target.get(MODE) or 'not set'}"
    return TOKEN if target.get(TOKEN) else str(target.get(TOKEN_PATH))


def _file_to_use(named: str | None) -> Path:
    if named:
        return _checked(Path(named).expanduser().absolute(), ours=False)
    path = token_file()
    if not path.exists():
        create(path)
    return _checked(path, ours=True)


def create(path: Path) -> None:
    """A new strong token in a file that only this user reads; whoever is first wins, and nobody sees half a token."""
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(descriptor, secrets.token_hex(32).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    except OSError as error:
        raise ValueError(f"cannot write the cluster token {path}: {error.strerror}") from error


def _checked(path: Path, ours: bool) -> Path:
    """The file, if it holds a token. Ours is made private again; for somebody else's we only speak up."""
    try:
        state = path.stat()
        empty = not path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"cannot read the cluster token {path}: {why}") from None
    if empty:
        raise ValueError(f"the cluster token {path} is empty; delete the file, and a new one is made")
    if ours and state.st_uid != os.getuid():
        raise ValueError(f"the cluster token {path} belongs to another user; delete it, or set {TOKEN_PATH}")
    open_to = stat.S_IMODE(state.st_mode) & (0o077 if ours else 0o007)
    if open_to and ours:
        path.chmod(0o600)
        logger.warning("%s could be read by others and is 0600 now; delete it for a new token if they may have", path)
    elif open_to:
        logger.warning("%s can be read by every user of this machine; whoever has it can run code as you", path)
    return path


def _tell_ray() -> None:
    """Ray has read its mode if it is imported already. This is what Ray itself does when it turns token mode on."""
    raylet = sys.modules.get("ray._raylet")
    if raylet is not None:
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
