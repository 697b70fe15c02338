"""RunConfig: the parts' own configs put together, read from one YAML file and dotted overrides.

    defaults  <  what the algorithm, or a paper's preset, brings along  <  run file  <  overrides

Relative paths in a run file count from the file's folder, those in an override from the working directory.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field, ValidationError, create_model

import rlalign
from rlalign import plugins, runfile
from rlalign.checkpoint import CheckpointConfig
from rlalign.checks import refuse
from rlalign.complaints import Source, complaint, refuse_booleans
from rlalign.confighash import hash_of, hashed_part
from rlalign.evaluation.heldout import EvaluationConfig
from rlalign.models.base import EncodesImages
from rlalign.models.lora import LoraConfig
from rlalign.models.memory import MemoryConfig
from rlalign.overlays import ALGORITHM_NAME, choose, plugin
from rlalign.paths import anchored, own_overrides, spelled_out
from rlalign.policy import RolloutConfig
from rlalign.prompts import PromptsConfig
from rlalign.prompts.sources import contents
from rlalign.reporting.sinks import ReportingConfig
from rlalign.runfile import Override, Tree, merged
from rlalign.runtime.config import RuntimeConfig
from rlalign.scoring import RewardConfig
from rlalign.scoring.config import is_url
from rlalign.settings import Settings
from rlalign.workers.learner import EmaConfig
from rlalign.workers.optimizer import OptimizerConfig

RECIPES = Path(rlalign.__file__).parent / "recipes"


class ModelConfig(Settings):
    """What is trained. The family's own keys stand in the same block."""

    family: str
    """A name of `rlalign models list`, a module, or path/to/file.py."""
    path: str = ""
    """A folder, a Hub id, or a shipped model such as zoo:scenes."""
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32"
    """Of the frozen weights, and of all weights under full fine-tuning; those in bfloat16 then have float32 masters."""
    lora: LoraConfig | None = LoraConfig()
    """Low-rank adapters; null trains all weights."""
    train: list[str] | None = Field(default=None, min_length=1)
    """Names of the nets to train; null: the family's first."""
    memory: MemoryConfig = MemoryConfig()
    """How a large model fits onto a GPU."""


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
        """What decides the numbers.

        Prompts count by their contents and rewards by name: a run can be moved, and go on once a reward is mended.
        """
        part = hashed_part(self.tree())
        for number, reward in enumerate(self.rewards):
            part[f"rewards.{number}.use"] = reward.use if is_url(reward.use) else reward.use.rpartition("/")[2]
        return {key: value for key, value in part.items() if not key.startswith("prompts.")} | contents(self.prompts)

    @property
    def config_hash(self) -> str:
        """The same for two configs that mean the same numbers."""
        return hash_of(self.hashed())


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
    own = anchored(spelled_out(tree), folder)
    given = [one for keys, value in overrides for one in own_overrides(keys, value)]
    own, brought, algorithm = choose(own, given)
    layered = merged(brought, own)
    for override in given:
        if override[0] != ALGORITHM_NAME:
            runfile.put(layered, override)
    return _validated(layered, algorithm, Source(name, own, brought, given))


def _validated(tree: Tree, algorithm: ModuleType, source: Source) -> RunConfig:
    kind = config_class(_family(tree, source), algorithm)
    try:
        config = kind.model_validate(tree)
    except ValidationError as error:
        raise ValueError(complaint(error, kind, source)) from None
    refuse_booleans(tree, config.tree())
    refuse(config)
    if config.rollout.source == "data":
        refuse_data(config)
    return config


def refuse_data(config: RunConfig) -> None:
    """ValueError for what cannot learn from recorded images."""
    needs, model = config.algorithm_module.Algorithm(config.algorithm).needs, config.model.family
    if needs.trajectory or (needs.reward_gradient and not needs.recorded):
        raise ValueError(
            f"rollout.source is data, but {config.algorithm.name} learns from the denoising steps of its own samples, "
            "which recorded images do not have; set algorithm.name to dpo, kto, nft or another that needs only final "
            "images, or rollout.source to samples"
        )
    if not issubclass(plugins.load("model", model).Family, EncodesImages) or config.rollout.size[2:] not in ((), (1,)):
        raise ValueError(
            f"rollout.source is data, but model.family {model} cannot encode what is recorded: it must have a method "
            "encode_images, and rollout.size must be that of an image"
        )


@cache
def config_class(family: ModuleType, algorithm: ModuleType) -> type[RunConfig]:
    """RunConfig with the blocks of this family and this algorithm in it."""
    model = create_model("ModelConfig", __base__=(family.Config, ModelConfig), __doc__=ModelConfig.__doc__)
    chosen = create_model("AlgorithmConfig", __base__=algorithm.Config, name=(str, ...))  # a file.py's name is its path
    fields: dict[str, Any] = {"model": (model, ...), "algorithm": (chosen, ...)}
    return create_model("RunConfig", __base__=RunConfig, __doc__=RunConfig.__doc__, **fields)


def _family(tree: Tree, source: Source) -> ModuleType:
    model = tree.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("family"), str):
        known = ", ".join(plugins.names("model"))
        raise ValueError(f"model.family is missing; it names the kind of model: {known} ({source(('model',))})")
    return plugin("model", model["family"], ("Config", "Family"), source(("model", "family")))
