"""Short spellings written out, and relative paths made absolute: from the run file's folder, or from where one is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rlalign
from rlalign import plugins, runfile
from rlalign.runfile import Override, Tree, merged

ZOO = "zoo:"
MODELS = Path(rlalign.__file__).parent / "zoo"


def spelled_out(tree: Mapping[str, Any]) -> Tree:
    """The tree with its short spellings written out as blocks."""
    return {key: _block(key, value) for key, value in tree.items()}


def _block(key: str, value: Any) -> Any:
    """`algorithm: nft`, `runtime: local` and `rewards: ocr` are short for blocks."""
    if key == "algorithm" and (value is None or isinstance(value, str)):
        return {"name": value} if value else {}
    if key == "runtime" and isinstance(value, str):
        return {"kind": value}
    if key == "rewards" and isinstance(value, (str, dict)):
        value = [value]
    if key == "rewards" and isinstance(value, list):
        return [{"use": one} if isinstance(one, str) else one for one in value]
    return value


def own_overrides(keys: tuple[str, ...], value: Any) -> list[Override]:
    """A block given whole is spelled out, and paths count from the working directory."""
    if len(keys) == 1:
        value = _block(keys[0], value)
    if keys[0] == "rewards" and len(keys) == 2 and isinstance(value, str):
        value = {"use": value}
    if keys in (("algorithm",), ("runtime",)) and isinstance(value, dict):
        return [one for key, inner in value.items() for one in own_overrides((*keys, key), inner)]
    holder: Tree = {}
    runfile.put(holder, (keys, value))
    found: Any = anchored(holder, Path())
    for key in keys:
        found = found[key]
    return [(keys, found)]


def anchored(tree: Tree, folder: Path) -> Tree:
    """The tree with what is relative to ``folder`` made absolute."""
    folder = folder.resolve()
    tree = merged({}, tree)
    for block, key in (("model", "family"), ("algorithm", "name")):
        _change(tree.get(block), key, lambda value: str(folder / value) if value.endswith(".py") else value)
    _change(tree.get("model"), "path", lambda value: _model_path(value, folder))
    memory = tree["model"].get("memory") if isinstance(tree.get("model"), dict) else None
    _change(memory, "embeddings", lambda value: str(folder / Path(value).expanduser()))
    _anchor_prompts(tree.get("prompts"), folder)
    rewards = tree.get("rewards")
    for reward in rewards.values() if isinstance(rewards, dict) else rewards if isinstance(rewards, list) else ():
        _change(reward, "use", lambda value: _reward_path(value, folder))
        _change(reward, "venv", lambda value: str(folder / Path(value).expanduser()))
    return tree


def _anchor_prompts(prompts: Any, folder: Path) -> None:
    for part in ("train", "heldout", "test"):
        _change(prompts, part, lambda value: str(folder / Path(value).expanduser()))
        source = prompts.get(part) if isinstance(prompts, dict) else None
        _change(source, "path", lambda value: str(folder / Path(value).expanduser()))
        _change(source, "dataset", lambda value: _dataset_path(value, folder))


def _dataset_path(name: str, folder: Path) -> str:
    """What is no folder is a name on the Hub, unless it is written like a path."""
    local = folder / Path(name).expanduser()
    return str(local) if local.exists() or name[0] in "./~" else name


def _change(block: Any, key: str, change: Any) -> None:
    if isinstance(block, dict) and isinstance(block.get(key), str) and block[key]:
        block[key] = change(block[key])


def _model_path(path: str, folder: Path) -> str:
    """What is no folder may be a Hub id, which has at most one slash, or a shipped name; both stay as they are."""
    local = folder / Path(path).expanduser()
    if path.startswith(ZOO) or (not local.exists() and path.count("/") == 1 and path[0] not in "./~"):
        return path
    return str(local)


def _reward_path(use: str, folder: Path) -> str:
    source, colon, function = use.rpartition(":")
    return f"{folder / Path(source).expanduser()}:{function}" if colon and source.endswith(".py") else use


def model_path(path: str) -> str:
    """Where the weights are: a folder that exists, a Hub id, or nothing for families without files."""
    if path.startswith(ZOO):
        return str(_zoo(path.removeprefix(ZOO)))
    if Path(path).is_absolute() and not Path(path).is_dir():
        raise ValueError(f"model.path: there is no folder {path}")
    return path


def zoo_names() -> list[str]:
    """The shipped models."""
    return sorted(index.parent.name for index in MODELS.glob("*/model_index.json"))


def _zoo(name: str) -> Path:
    if name not in zoo_names():
        known = plugins.did_you_mean(name, zoo_names()) if zoo_names() else "; none is installed"
        raise ValueError(f"model.path: no shipped model {ZOO}{name}{known}")
    return MODELS / name
