"""Fills the tables of the pages from the code: `python docs/generate.py`. A test keeps the two together.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is between them is overwritten.
"""

import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rlalign import plugins
from rlalign.algorithms import forward, regularise
from rlalign.checkpoint import CheckpointConfig
from rlalign.config import ModelConfig, PromptsConfig, RunConfig
from rlalign.evaluation.heldout import EvaluationConfig
from rlalign.models import sd3
from rlalign.models.lora import LoraConfig
from rlalign.overlays import DEFAULT_ALGORITHM
from rlalign.policy import RolloutConfig, Window
from rlalign.reporting.glossary import METRICS
from rlalign.reporting.sinks import ReportingConfig
from rlalign.runtime.config import RuntimeConfig
from rlalign.runtime.telemetry import EXPORTED, prometheus_name
from rlalign.scoring.config import RewardConfig
from rlalign.scoring.remote import RemoteOptions
from rlalign.workers.learner import EmaConfig, OptimizerConfig

DOCS = Path(__file__).parent
BLOCKS: dict[str, type[BaseModel]] = {
    "run": RunConfig,
    "model": ModelConfig,
    "lora": LoraConfig,
    "sd3": sd3.Config,
    "prompts": PromptsConfig,
    "rollout": RolloutConfig,
    "window": Window,
    "rewards": RewardConfig,
    "url options": RemoteOptions,
    **{name: plugins.load("algorithm", name).Config for name in plugins.names("algorithm")},
    "ramp": forward.Ramp,
    "penalty": regularise.Penalty,
    "optimizer": OptimizerConfig,
    "ema": EmaConfig,
    "evaluation": EvaluationConfig,
    "checkpoint": CheckpointConfig,
    "runtime": RuntimeConfig,
    "reporting": ReportingConfig,
}
MARKED = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str) -> str:
    """The page with its tables as the code has them."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", page)


def table(name: str) -> str:
    own = {"metrics": metrics, "prometheus": prometheus}
    return "\n".join(own[name]() if name in own else keys(BLOCKS[name]))


def metrics() -> Iterator[str]:
    yield "| metric | meaning |"
    yield "|---|---|"
    yield from (f"| {_code(name)} | {_cell(meaning)} |" for name, meaning in METRICS.items())


def prometheus() -> Iterator[str]:
    yield "| Prometheus | labels | in a row | meaning |"
    yield "|---|---|---|---|"
    for name, one in EXPORTED.items():
        labels = ", ".join(_code(label) for label in ("run", one.label) if label)
        yield f"| {_code(prometheus_name(name))} | {labels} | {_code(one.row)} | {_cell(one.meaning)} |"


def keys(block: type[BaseModel]) -> Iterator[str]:
    """One row a field: its name, what it may be, its default, its sentence."""
    yield "| key | values | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in block.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = _code(DEFAULT_ALGORITHM) if field.annotation is Any else _default(default)
        yield f"| `{name}` | {_values(field.annotation)} | {shown} | {_cell(field.description or '')} |"


def _values(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(_code(_yaml(value)) for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_values(part) for part in get_args(annotation))
    if get_origin(annotation) is tuple:
        return "[" + ", ".join("..." if part is ... else _values(part) for part in get_args(annotation)) + "]"
    if get_origin(annotation) is dict:
        return "mapping"
    if get_origin(annotation) is list:
        return f"list of {_values(get_args(annotation)[0])}"
    if annotation is Path:
        return "path"
    words = {int: "integer", float: "number", bool: "true or false", str: "text", type(None): "null"}
    if annotation is Any:
        return "block"
    return words.get(annotation, "block") if isinstance(annotation, type) else _values(get_args(annotation)[0])


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "its own"
    return "required" if value is PydanticUndefined else _code(_yaml(value))


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _code(text: str) -> str:
    return f"`{text}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    for page in sorted(DOCS.rglob("*.md")):
        page.write_text(filled(page.read_text()))
