"""Finding parts by name: the folder is the registry, a dotted path or file.py:name reaches outside it."""

import difflib
import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal

Kind = Literal["algorithm", "model"]
FOLDERS: dict[Kind, str] = {"algorithm": "rlalign.algorithms", "model": "rlalign.models"}
NOT_PLUGINS = {
    "base",
    "lora",
    "single_file",
    "flow_match",
    "flux_packed",
    "video",
    "qwen_packed",
    "images",
    "conventions",
    "agreement",
    "memory",
    "embeddings",
    "sizes",
    "advantages",
    "baselines",
    "losses",
    "forward",
    "regularise",
    "pairs",
    "reward_gradients",
    "grpo_presets",
}


def names(kind: Kind) -> list[str]:
    """The short names of what is shipped, read off the folder."""
    package = importlib.import_module(FOLDERS[kind])
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in NOT_PLUGINS)


def load(kind: Kind, name: str) -> ModuleType:
    """The module that defines a part: a short name, a dotted module or a file.py. ValueError says what is wrong."""
    if name in names(kind):
        return importlib.import_module(f"{FOLDERS[kind]}.{name}")
    if name.endswith(".py"):
        return module_from_file(Path(name))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not f"{name}.".startswith(f"{error.name}."):
            raise  # the module exists; something that it imports does not
        raise ValueError(f"no {kind} called {name!r}{did_you_mean(name, names(kind))}") from None


def module_from_file(path: Path) -> ModuleType:
    """Imports a Python file that is on nobody's path, under a name of its own."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"rlalign_plugin_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def did_you_mean(word: str, known: list[str]) -> str:
    """'; did you mean X?' or the list of what there is."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(known)}"
