"""RunConfig: the parts' own configs put together, read from one YAML file and dotted overrides.

    defaults  <  what the algorithm, or a paper's preset, brings along  <  run file  <  overrides

Relative paths in a run file count from the file's folder, those in an override from the working directory.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field, ValidationError, create_model

import rlalign
from rlalign import plugins, runfile
from rlalign.checkpoint import CheckpointConfig
from rlalign.complaints import Place, complaint, dotted, refuse_booleans
from rlalign.confighash import hash_of, hashed_part
from rlalign.evaluation.heldout import EvaluationConfig
from rlalign.models.lora import LoraConfig
from rlalign.policy import RolloutConfig
from rlalign.reporting.sinks import ReportingConfig
from rlalign.runfile import Override, Tree, merged, without
from rlalign.scoring import RewardConfig
from rlalign.scoring.config import is_url
from rlalign.settings import Settings
from rlalign.workers.learner import EmaConfig, OptimizerConfig

PACKAGE = Path(rlalign.__file__).parent
RECIPES = PACKAGE / "recipes"
ZOO = "zoo:"
COMMAND_LINE = "command line"
ALGORITHM_NAME = ("algorithm", "name")
DEFAULT_ALGORITHM = "grpo"


class ModelConfig(Settings):
    """What is trained. The family's own keys stand in the same block."""

    family: str
    """A name of `rlalign models list`, a module, or path/to/file.py."""
    path: str = ""
    """A folder, a Hub id, or a shipped model such as zoo:scenes."""
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    """Of the frozen weights, and of all weights under full fine-tuning."""
    lora: LoraConfig | None = LoraConfig()
    """Low-rank adapters; null trains all weights."""
    train: list[str] | None = Field(default=None, min_length=1)
    """Names of the nets to train; null: the family's first."""


class PromptsConfig(Settings):
    """Prompt files: .txt, .jsonl or .parquet."""

    train: Path
    """Prompts to learn on."""
    heldout: Path
    """Prompts to judge on, none of which should be trained on."""


class RuntimeConfig(Settings):
    """On which machines, and how many of what."""

    kind: Literal["local", "ray"] = "local"
    """local: all in this process."""
    samplers: int = Field(default=1, ge=1)
    """Workers that make samples; the numbers do not depend on it."""
    scorers: int = Field(default=1, ge=1)
    """Workers that compute rewards."""
    threads_per_worker: int = Field(default=1, ge=1)
    """CPU threads of a worker; part of the numbers, since they decide the order of sums."""
    max_staleness: int = Field(default=0, ge=0)
    """How many versions the weights that sample may lag behind those that learn; 0 is synchronous."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """auto takes the first GPU, and the CPU where there is none."""


class RunConfig(Settings):
    """One run. ``model``, ``prompts`` and ``rewards`` have no default."""

    model: ModelConfig
    """What is trained."""
    prompts: PromptsConfig
    """What it is trained on."""
    rollout: RolloutConfig
    """How samples are made."""
    rewards: list[RewardConfig]
    """What is wanted: a list of entries such as {use: composition, weight: 1.0}."""
    algorithm: Any
    """How rewards become updates: a name of `rlalign algorithms list` and that algorithm's own keys."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become steps."""
    ema: EmaConfig | None = None
    """A running average of the weights; null: none."""
    runtime: RuntimeConfig = RuntimeConfig()
    """On which machines."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How it is judged."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When it is saved."""
    reporting: ReportingConfig = ReportingConfig()
    """Where metrics go besides the run directory."""
    steps: int = Field(default=100, ge=1)
    """Steps of sampling and learning."""
    seed: int = Field(default=0, ge=0)
    """All random numbers of the run follow from it."""

    @property
    def algorithm_module(self) -> ModuleType:
        """The file that defines the algorithm."""
        return plugins.load("algorithm", self.algorithm.name)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps a batch."""
        return self.algorithm.updates_per_step

    def tree(self) -> Tree:
        """Plain values that YAML holds and that read back to the same config."""
        return self.model_dump(mode="json")

    def hashed(self) -> Tree:
        """What decides the numbers. A file counts for what it is and not for where it lies, so that runs can be moved."""
        part = hashed_part(self.tree())
        for number, reward in enumerate(self.rewards):
            part[f"rewards.{number}.use"] = reward.use if is_url(reward.use) else reward.use.rpartition("/")[2]
        for name, path in (("train", self.prompts.train), ("heldout", self.prompts.heldout)):
            part[f"prompts.{name}"] = _digest(path)
        return part

    @property
    def config_hash(self) -> str:
        """The same for two configs that mean the same numbers."""
        return hash_of(self.hashed())


def _digest(path: Path) -> str:
    try:
        return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    except OSError as error:
        raise ValueError(f"cannot read the prompts file {path}: {error.strerror}") from None


# --- from a file and the command line


def find(name: str) -> Path:
    """A run file by its path, or a shipped recipe by its name."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise ValueError(f"there is no run file {name}")
    if path.exists():
        raise ValueError(f"{name} is no run file; `rlalign resume` goes on with the run in a folder")
    if name not in recipes():
        raise ValueError(f"there is no run file or recipe {name!r}{plugins.did_you_mean(name, recipes())}")
    return RECIPES / f"{name}.yaml"


def recipes() -> list[str]:
    """Names of the run files that are shipped."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file with overrides such as ``optimizer.lr=1e-4`` applied; ValueError says what to change."""
    return resolve(runfile.read(path), path.parent, path.name, runfile.parse(overrides))


def resolve(tree: Mapping[str, Any], folder: Path, name: str, overrides: Sequence[Override] = ()) -> RunConfig:
    """The config that a run file's tree, found in ``folder``, means; ``name`` stands in messages."""
    own = _anchored(_spelled_out(tree), folder)
    given = [one for keys, value in overrides for one in _own_overrides(keys, value)]
    own, brought, algorithm = _chosen(own, given)
    layered = merged(brought, own)
    for override in given:
        if override[0] != ALGORITHM_NAME:
            runfile.put(layered, override)
    return _validated(layered, algorithm, Source(name, own, brought, given))


def _validated(tree: Tree, algorithm: ModuleType, source: "Source") -> RunConfig:
    from rlalign.checks import refuse

    kind = config_class(_family(tree, source), algorithm)
    try:
        config = kind.model_validate(tree)
    except ValidationError as error:
        raise ValueError(complaint(error, kind, source)) from None
    refuse_booleans(tree, config.tree())
    refuse(config)
    return config


@cache
def config_class(family: ModuleType, algorithm: ModuleType) -> type[RunConfig]:
    """RunConfig with the blocks of this family and this algorithm in it."""
    model = create_model("ModelConfig", __base__=(family.Config, ModelConfig), __doc__=ModelConfig.__doc__)
    chosen = create_model("AlgorithmConfig", __base__=algorithm.Config, name=(str, ...))  # a file.py's name is its path
    fields: dict[str, Any] = {"model": (model, ...), "algorithm": (chosen, ...)}
    return create_model("RunConfig", __base__=RunConfig, __doc__=RunConfig.__doc__, **fields)


def _family(tree: Tree, source: "Source") -> ModuleType:
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("family"), str):
        known = ", ".join(plugins.names("model"))
        raise ValueError(f"model.family is missing; it names the kind of model: {known} ({source(('model',))})")
    return _plugin("model", model["family"], "Family", source(("model", "family")))


def _plugin(kind: plugins.Kind, name: str, part: str, source: str) -> ModuleType:
    try:
        module = plugins.load(kind, name)
    except ValueError as error:
        raise ValueError(f"{error} ({source})") from None
    if not (hasattr(module, "Config") and hasattr(module, part)):
        raise ValueError(f"{name} is no {kind}: it defines no Config and {part} ({source})")
    return module


# --- what an algorithm brings along


def _chosen(own: Tree, overrides: Sequence[Override]) -> tuple[Tree, Tree, ModuleType]:
    """What of the run file's tree holds, what the chosen algorithm brings along, and its module.

    Another algorithm than the file's brings its own settings: what the file says for its own algorithm is dropped.
    """
    block = own.get("algorithm", {})
    if not isinstance(block, dict):
        raise ValueError(f"algorithm is {block!r}, but must be a name or a block of keys, one of them `name`")
    in_file = block.get("name", DEFAULT_ALGORITHM)
    chosen = next((value for keys, value in reversed(overrides) if keys == ALGORITHM_NAME), in_file)
    if chosen != in_file:
        own, block = without(own, {**overlay(in_file)[0], "algorithm": None}), {}
    brought, module = overlay(chosen)
    return {**own, "algorithm": {**block, "name": _short_name(chosen)}}, brought, module


def _short_name(chosen: str) -> str:
    """A preset's algorithm, or the name as it was given."""
    return presets()[chosen][0].__name__.rpartition(".")[2] if chosen in presets() else chosen


def overlay(name: Any) -> tuple[Tree, ModuleType]:
    """What choosing an algorithm or a paper's preset means for the other blocks, and the algorithm's module."""
    if not isinstance(name, str):
        raise ValueError(f"algorithm.name is {name!r}, but must be one of {', '.join(algorithm_names())}")
    module, preset = presets().get(name, (None, {}))
    if module is None:
        known = algorithm_names()
        if name not in known and not name.endswith(".py") and "." not in name:
            raise ValueError(f"no algorithm or preset called {name!r}{plugins.did_you_mean(name, known)}")
        module = _plugin("algorithm", name, "Algorithm", "algorithm.name")
    return merged(module.OVERLAY, preset), module


def presets() -> dict[str, tuple[ModuleType, Tree]]:
    """The papers' presets: each with the algorithm that it sets."""
    modules = [plugins.load("algorithm", name) for name in plugins.names("algorithm")]
    return {name: (module, preset) for module in modules for name, preset in getattr(module, "PRESETS", {}).items()}


def algorithm_names() -> list[str]:
    return [*plugins.names("algorithm"), *presets()]


# --- short spellings, and paths


def _spelled_out(tree: Mapping[str, Any]) -> Tree:
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


def _own_overrides(keys: tuple[str, ...], value: Any) -> list[Override]:
    """A block given whole is spelled out, and paths count from the working directory."""
    if len(keys) == 1:
        value = _block(keys[0], value)
    if keys[0] == "rewards" and len(keys) == 2 and isinstance(value, str):
        value = {"use": value}
    if keys in (("algorithm",), ("runtime",)) and isinstance(value, dict):
        return [one for key, inner in value.items() for one in _own_overrides((*keys, key), inner)]
    holder: Tree = {}
    runfile.put(holder, (keys, value))
    found: Any = _anchored(holder, Path())
    for key in keys:
        found = found[key]
    return [(keys, found)]


def _anchored(tree: Tree, folder: Path) -> Tree:
    """The tree with what is relative to ``folder`` made absolute."""
    folder = folder.resolve()
    tree = merged({}, tree)
    for block, key in (("model", "family"), ("algorithm", "name")):
        _change(tree.get(block), key, lambda value: str(folder / value) if value.endswith(".py") else value)
    _change(tree.get("model"), "path", lambda value: _model_path(value, folder))
    for key in ("train", "heldout"):
        _change(tree.get("prompts"), key, lambda value: str(folder / Path(value).expanduser()))
    rewards = tree.get("rewards")
    for reward in rewards.values() if isinstance(rewards, dict) else rewards if isinstance(rewards, list) else ():
        _change(reward, "use", lambda value: _reward_path(value, folder))
    return tree


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


def model_path(config: ModelConfig) -> str:
    """Where the weights are: a folder that exists, a Hub id, or nothing for families without files."""
    if config.path.startswith(ZOO):
        return str(_zoo(config.path.removeprefix(ZOO)))
    if Path(config.path).is_absolute() and not Path(config.path).is_dir():
        raise ValueError(f"model.path: there is no folder {config.path}")
    return config.path


def zoo_names() -> list[str]:
    """The shipped models."""
    return sorted(index.parent.name for index in (PACKAGE / "zoo").glob("*/model_index.json"))


def _zoo(name: str) -> Path:
    if name not in zoo_names():
        known = plugins.did_you_mean(name, zoo_names()) if zoo_names() else "; none is installed"
        raise ValueError(f"model.path: no shipped model {ZOO}{name}{known}")
    return PACKAGE / "zoo" / name


# --- which of the two a wrong value came from


class Source:
    """Names where the value at a place of the run file comes from."""

    def __init__(self, name: str, own: Tree, brought: Tree, overrides: Sequence[Override]) -> None:
        self.name, self.own, self.brought = name, own, brought
        self.overridden = [".".join(keys) for keys, _ in overrides]

    def __call__(self, place: Place) -> str:
        key = dotted(place)
        if any(f"{key}.".startswith(f"{one}.") for one in self.overridden):
            return COMMAND_LINE
        return "set by the algorithm" if _holds(self.brought, place) and not _holds(self.own, place) else self.name


def _holds(tree: Any, place: Place) -> bool:
    if not place:
        return True
    first, *rest = place
    inside = isinstance(tree, dict) and first in tree
    inside = inside or (isinstance(tree, list) and isinstance(first, int) and first < len(tree))
    return inside and _holds(tree[first], tuple(rest))
