"""From what the run file says to a callable. Whatever is wrong is a ValueError of one sentence."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from rlalign.plugins import did_you_mean, module_from_file
from rlalign.scoring import environment
from rlalign.scoring.apart import Apart
from rlalign.scoring.config import RewardConfig, check_rewards, is_url
from rlalign.scoring.protocol import DIFFERENTIABLE, GROUPWISE, OF_RECORDINGS, Reward
from rlalign.scoring.remote import RemoteOptions, RemoteReward

CATALOGUE = "rlalign.rewards"
"""The entry-point group that gives rewards their short names; any installed package may join it."""


def reward_names() -> list[str]:
    """The short names that installed packages offer."""
    return sorted(entry_points(group=CATALOGUE).names)


def load_rewards(rewards: Sequence[RewardConfig], folder: Path = Path()) -> list[Reward]:
    """All rewards of a run file that lies in `folder`."""
    check_rewards(rewards)
    return [load_reward(reward, folder) for reward in rewards]


def load_reward(config: RewardConfig, folder: Path = Path()) -> Reward:
    """One reward, constructed; a file's path counts from `folder`."""
    try:
        load = _apart if config.apart else _local
        reward = _remote(config) if is_url(config.use) else load(config, folder)
        if reward.groupwise and config.batch_size is not None:
            raise ValueError("it is groupwise and gets one group in a call; leave batch_size out")
    except ValueError as error:
        raise ValueError(f"reward {config.name!r}: {error}") from error
    return reward


def find_reward(name: str) -> Callable[..., object]:
    """What a short name stands for, a class not constructed: its docstring is to be had without its weights."""
    return _from_catalogue(name)


def _remote(config: RewardConfig) -> Reward:
    try:
        options = RemoteOptions(**config.options)
    except ValidationError as error:
        raise ValueError(_first_complaint(error)) from None
    return Reward(config, RemoteReward(config.use, config.timeout_s, options), groupwise=options.groupwise)


def _first_complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"a URL has no option {key!r}{did_you_mean(key, list(RemoteOptions.model_fields))}"
    return f"option {key!r}: {first['msg']}"


def _apart(config: RewardConfig, folder: Path) -> Reward:
    venv = None if config.venv is None else (folder / Path(config.venv).expanduser()).absolute()
    function = Apart(config, environment.interpreter(venv, config.pip), folder)
    return Reward(config, function, groupwise=function.groupwise)


def _local(config: RewardConfig, folder: Path) -> Reward:
    found = _find(config.use, folder)
    return Reward(
        config,
        _ready(found, config.options),
        groupwise=getattr(found, GROUPWISE, False),
        differentiable=getattr(found, DIFFERENTIABLE, False),
        of_recordings=getattr(found, OF_RECORDINGS, False),
    )


def _find(use: str, folder: Path) -> Any:
    source, colon, name = use.rpartition(":")
    if not colon:
        return _from_catalogue(use)
    module = _from_file(folder / source) if source.endswith(".py") else _from_module(source)
    try:
        return getattr(module, name)
    except AttributeError:
        raise ValueError(f"{source} has no {name!r}{_did_you_mean(name, _callables(module))}") from None


def _from_catalogue(name: str) -> Any:
    found = {entry.value: entry for entry in entry_points(group=CATALOGUE, name=name)}  # one package twice is one
    if not found:
        hint = _did_you_mean(name, reward_names()) or "; no installed package offers any: is rlalign itself installed?"
        raise ValueError(f"the catalogue has no {name!r}{hint} (your own: module:function or path/to/file.py:function)")
    if len(found) > 1:
        raise ValueError(f"several packages offer {name!r} ({', '.join(sorted(found))}); name one of these instead")
    return _imported(next(iter(found.values())))


def _imported(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:
        raise ValueError(f"{entry.value} cannot be loaded: {_in_words(error)}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return module_from_file(path)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be imported: {_in_words(error)}") from error


def _from_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        hint = "; for a file write path/to/file.py:function" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"module {name!r} cannot be imported: {_in_words(error)}{hint}") from error


def _ready(found: Any, options: Mapping[str, Any]) -> Callable[..., object]:
    """The callable (images, prompts), with its options in place."""
    if inspect.isclass(found):
        found, options = _constructed(found, options), {}
    if not callable(found):
        raise ValueError(f"it is {found!r:.60}; a reward is a function or a class with __call__")
    _check_signature(found, options)
    return partial(found, **options) if options else found


def _constructed(kind: type[Any], options: Mapping[str, Any]) -> Any:
    try:
        return kind(**options)
    except Exception as error:
        given = f"the options {', '.join(options)}" if options else "no options"
        raise ValueError(f"{kind.__name__} cannot be constructed with {given}: {_in_words(error)}") from error


def _check_signature(function: Callable[..., object], options: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # some functions written in C do not tell
    try:
        signature.bind(None, None, **options)
    except TypeError as error:
        given = ", ".join(["images", "prompts", *options])
        raise ValueError(f"it cannot be called with ({given}): {error}") from None


def _callables(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]


def _did_you_mean(word: str, known: list[str]) -> str:
    return did_you_mean(word, known) if known else ""


def _in_words(error: BaseException) -> str:
    """The error's last line, as under a traceback."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[-1]}" if text else type(error).__name__
