"""serve-reward: any reward behind HTTP, until it is told to end."""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlalign import runfile
from rlalign.commands.problems import BadInput, in_preparation
from rlalign.plugins import did_you_mean
from rlalign.scoring import RewardConfig, environment
from rlalign.scoring.config import is_url
from rlalign.serving import token as tokens
from rlalign.serving.config import ServeConfig


@dataclass(frozen=True, slots=True)
class Wish:
    name: str
    options: Sequence[str]
    host: str
    port: int
    workers: int
    token_file: Path | None
    gpus: str | None
    more: Sequence[str]
    venv: Path | None = None
    pip: Sequence[str] = ()

    def arguments(self) -> list[str]:
        """Of the same command in another environment."""
        own = {"--host": self.host, "--port": self.port, "--workers": self.workers}
        own |= {"--token-file": self.token_file} if self.token_file else {}
        own |= {"--gpus": self.gpus} if self.gpus else {}
        words = [word for option, value in own.items() for word in (option, str(value))]
        return [*words, *(word for one in self.more for word in ("--set", one)), "--", self.name, *self.options]


def serve_reward(wish: Wish) -> int:
    """Returns when it was told to end and has answered what it had accepted."""
    if wish.pip and wish.venv is None:
        raise BadInput("--pip says what to install in --venv DIR; give both")
    if wish.venv is not None:
        with in_preparation():
            python = environment.python_of(wish.venv.expanduser().absolute(), wish.pip)
        os.execv(python, [str(python), "-m", "rlalign", "serve-reward", *wish.arguments()])
    with in_preparation():
        config = _config(wish)
        path = tokens.required(config.host, wish.token_file)
        token = None if path is None else tokens.read(path)
        reward = _reward(wish, config)
        try:
            from rlalign.serving.server import serve
        except ModuleNotFoundError as error:
            raise BadInput(f"{error.name} is not installed; pip install aiohttp prometheus-client") from error
        try:
            asyncio.run(serve(reward, Path(), config, token, lambda url: _announce(url, reward, config, path)))
        except asyncio.CancelledError:
            raise BadInput("asked twice to end, so what was accepted is not finished") from None
    return 0


def _announce(url: str, reward: RewardConfig, config: ServeConfig, path: Path | None) -> None:
    batches = f"{config.workers} worker{'s' if config.workers > 1 else ''}, up to {config.batch_size} pictures a call"
    options = ", options: {token_env: REWARD_TOKEN}" if path else ""
    print(f"reward    {reward.use} ({batches})")
    print(f"listening {url}/{reward.name}")
    print(f"token     {path or 'none is asked for: only this machine can reach it'}")
    print(f'run file  - {{use: "{url}/{reward.name}"{options}}}')
    print("to stop   Ctrl-C, or SIGTERM: what was accepted is finished", flush=True)


def _config(wish: Wish) -> ServeConfig:
    given: dict[str, Any] = {"host": wish.host, "port": wish.port, "workers": wish.workers}
    if wish.gpus is not None:
        given["gpus"] = [gpu.strip() for gpu in wish.gpus.split(",")]
    try:
        return ServeConfig(**given | _values(wish.more))
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        raise BadInput(f"--set has no key {key!r}{did_you_mean(key, list(ServeConfig.model_fields))}")
    raise BadInput(f"{key}: {first['msg']}, not {first['input']!r:.60}")


def _reward(wish: Wish, config: ServeConfig) -> RewardConfig:
    if is_url(wish.name):
        raise BadInput(f"{wish.name} is a URL already; serve a name, module:function or path/to/file.py:function")
    try:
        return RewardConfig(use=wish.name, timeout_s=config.timeout_s, options=_values(wish.options))
    except ValidationError as error:
        raise BadInput(error.errors()[0]["msg"].partition(", ")[2]) from None


def _values(words: Sequence[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for override in runfile.parse(words):
        runfile.put(tree, override)
    return tree
