"""The bearer token of a reward service: one line in a file that only this user reads."""

import hmac
import logging
import os
import stat
from pathlib import Path

from rlalign.runtime import auth
from rlalign.runtime.processes import LOOPBACK

logger = logging.getLogger("rlalign")

ENOUGH = 16  # characters; `auth.create` writes 64


def token_file() -> Path:
    """The one that is made where none is named."""
    return auth.home() / "reward_token"


def required(host: str, named: Path | None) -> Path | None:
    """The file with the token that requests must carry; made where it is missing, None where none is needed."""
    if named is None and host in LOOPBACK:
        return None
    path = (named or token_file()).expanduser().absolute()
    if not path.exists():
        auth.create(path)
    return path


def read(path: Path) -> str:
    """The token, from a file with mode 0600; one that others may read is closed to them, and that is said."""
    try:
        state = path.stat()
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"cannot read the token {path}: {why}") from None
    if state.st_uid != os.getuid():
        raise ValueError(f"the token {path} belongs to another user; name a file of yours")
    if len(token) < ENOUGH or not token.isascii() or len(token.split()) != 1:
        raise ValueError(
            f"the token {path} must be one word of at least {ENOUGH} letters; delete the file for a new one"
        )
    if stat.S_IMODE(state.st_mode) & 0o077:
        path.chmod(0o600)
        logger.warning("%s could be read by others and is 0600 now; delete it for a new token if they may have", path)
    return token


def refusal(header: str | None, token: str | None) -> str:
    """'' where an Authorization header is good enough, else what is wrong with it."""
    if token is None:
        return ""
    if header is None:
        return "this server wants a token; send it as `Authorization: Bearer TOKEN`"
    kind, _, given = header.partition(" ")
    good = hmac.compare_digest(given.strip().encode(errors="replace"), token.encode())
    return "" if good and kind.lower() == "bearer" else "the token is wrong"
