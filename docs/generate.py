"""Fills the tables of the pages from the code: `python docs/generate.py`. A test keeps the two together.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is between them is overwritten. In a sentence
`<!-- exact: FORMAT NAME of TEST -->` is followed by what the exact ladder measured under that name in the tests whose
names begin so, with their seeds, up to `<!-- -->`.
"""

import json
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, Union, get_args, get_origin

from diffusers import DiffusionPipeline
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from rlalign import plugins
from rlalign.algorithms import forward, regularise
from rlalign.checkpoint import CheckpointConfig
from rlalign.config import ModelConfig, RunConfig
from rlalign.evaluation.heldout import EvaluationConfig
from rlalign.models import sd3
from rlalign.models.base import classifier_free_guidance
from rlalign.models.lora import LoraConfig
from rlalign.models.memory import MemoryConfig
from rlalign.overlays import DEFAULT_ALGORITHM
from rlalign.policy import RolloutConfig, Window
from rlalign.prompts.config import PromptsConfig, Source
from rlalign.reporting.glossary import METRICS
from rlalign.reporting.sinks import ReportingConfig
from rlalign.runtime.config import RuntimeConfig
from rlalign.runtime.telemetry import EXPORTED, prometheus_name
from rlalign.scoring.config import RewardConfig
from rlalign.scoring.remote import RemoteOptions
from rlalign.serving.config import ServeConfig
from rlalign.workers.learner import EmaConfig
from rlalign.workers.optimizer import OptimizerConfig

DOCS = Path(__file__).parent
BLOCKS: dict[str, type[BaseModel]] = {
    "run": RunConfig,
    "model": ModelConfig,
    "lora": LoraConfig,
    "memory": MemoryConfig,
    "sd3": sd3.Config,
    "prompts": PromptsConfig,
    "prompt source": Source,
    "rollout": RolloutConfig,
    "window": Window,
    "rewards": RewardConfig,
    "url options": RemoteOptions,
    "serve": ServeConfig,
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


NUMBER = re.compile(r"(<!-- exact: (\S+) (\S+) of (.*?) -->).*?(<!-- -->)")


def filled(page: str) -> str:
    """The page with its tables as the code has them, and its numbers as they were measured."""
    page = NUMBER.sub(lambda found: f"{found[1]}{measured(found[2], found[3], found[4])}{found[5]}", page)
    return MARKED.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", page)


def table(name: str) -> str:
    own = {"metrics": metrics, "prometheus": prometheus, "comparison": comparison}
    own |= {"families": families, "families tested": families_tested, "family keys": family_keys}
    own |= {"algorithm names": algorithm_names}
    own |= {"seeds of exact": seeds_of_exact}
    for prefix, rows in (("curve ", curve), ("exact ", exact), ("rung ", rung)):
        if name.startswith(prefix):
            return "\n".join(rows(name.removeprefix(prefix)))
    return "\n".join(own[name]() if name in own else keys(BLOCKS[name]))


Run = dict[str, Any]


def compared() -> dict[str, list[Run]]:
    """Runs of `benchmarks/comparison.py` by row, the best first."""
    found: dict[str, list[Run]] = {}
    for run in _results("results.json"):
        found.setdefault(run["name"], []).append(run)
    return dict(sorted(found.items(), key=lambda row: -_mean(row[1], lambda run: run["curve"][-1][1])))


def comparison() -> Iterator[str]:
    steps = [step for step, _ in next(iter(compared().values()))[0]["curve"]]
    curve = " | ".join(f"{step} steps" for step in steps[1:])
    yield f"| | seeds | before | {curve} | diversity | path KL, nats | network passes | with graph | CPU s |"
    yield "|---" * (len(steps) + 7) + "|"
    for name, runs in compared().items():
        curve = " | ".join(f"{_mean(runs, lambda run, i=i: run['curve'][i][1]):.3f}" for i in range(len(steps)))
        diversity, kl = (_mean(runs, lambda run, key=key: run[key]) for key in ("diversity", "path_kl"))
        costs = "{passes:,} | {with_graph:,} | {cpu_s:.0f}".format(**runs[-1])
        yield f"| {name} | {len(runs)} | {curve} | {diversity:.2f} | {kl:.3g} | {costs} |"


SAME = {"online_dpo": "dpo"}  # presets that set nothing but their name


def curve(name: str) -> Iterator[str]:
    """A sentence and a picture of one row."""
    if name in SAME:
        yield f"Its settings are those of `{SAME[name]}`, and so is [its curve](#on-the-shipped-pipeline)."
        return
    if ascents := [run for run in _results("saturation.json") if run["name"] == name]:
        yield from ascent(name, ascents)
        return
    runs = compared().get(name)
    if runs is None:
        yield "No run of it stands in [the comparison](../comparison.md)."
        return
    steps = runs[0]["curve"][-1][0]
    first, last = (_mean(runs, lambda run, i=i: run["curve"][i][1]) for i in (0, -1))
    kl, diversity = (_mean(runs, lambda run, key=key: run[key]) for key in ("path_kl", "diversity"))
    yield (
        f"{steps} steps of {runs[0]['images'] // steps} images, {_seeds(len(runs))}: held-out composition accuracy"
        f" {first:.3f} → {last:.3f}, {kl:.3g} nats from the base model, diversity {diversity:.2f},"
        f" {runs[-1]['passes']:,} passes of the network. [All algorithms side by side](../comparison.md)."
    )
    yield ""
    yield f"![{name} among the others](../assets/comparison/{name.partition(' ')[0]}.png)"


def ascent(name: str, runs: list[Run]) -> Iterator[str]:
    """The same of a method that needs a differentiable reward: runs of `benchmarks/ascent.py`."""
    steps = runs[0]["curve"][-1][0]
    first, last = (_mean(runs, lambda run, i=i: run["curve"][i][1]) for i in (0, -1))
    before, after = (_mean(runs, lambda run, i=i: run["heldout"][i][1]) for i in (0, -1))
    yield (
        f"{steps} steps of {runs[0]['images'] // steps} images on the reward `saturation`, {_seeds(len(runs))}:"
        f" held-out saturation {first:.3f} → {last:.3f}; composition accuracy, which nothing rewards, {before:.3f} →"
        f" {after:.3f}; diversity {_mean(runs, lambda run: run['diversity']):.2f}, {runs[0]['with_graph']:,} passes of"
        f" the network with a graph, {_mean(runs, lambda run: run['cpu_s']):.0f} CPU seconds."
    )
    yield ""
    yield "![saturation by steps](../assets/comparison/saturation.png)"


def exact(name: str) -> Iterator[str]:
    """What the exact ladder measured of one algorithm or preset."""
    proved = _proved()
    yield "| rung | of | measured | value | bound |"
    yield "|---|---|---|---|---|"
    for row in proved["rows"]:
        if row["algorithm"] == name:
            cells = (row["rung"], _cell(row["case"]), _cell(row["quantity"]), _values_of([row]), _cell(row["bound"]))
            yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"{_seeds_of(proved)}. [What the rungs are](../exact.md)."


def rung(name: str) -> Iterator[str]:
    """One rung, a row an algorithm and quantity: all its cases together."""
    found: dict[tuple[str, str, str], list[Run]] = {}
    for row in _proved()["rows"]:
        if row["rung"] == name:
            found.setdefault((row["algorithm"], row["quantity"], row["bound"]), []).append(row)
    yield "| | measured | cases | value | bound |"
    yield "|---|---|---|---|---|"
    for (algorithm, quantity, bound), rows in found.items():
        yield f"| `{algorithm}` | {_cell(quantity)} | {len(rows)} | {_values_of(rows)} | {_cell(bound)} |"


def seeds_of_exact() -> Iterator[str]:
    proved = _proved()
    failed = "".join(f" **failed** before anything was measured: `{test}`." for test in proved["without_row"])
    yield f"{_seeds_of(proved)}, torch {proved['torch']}.{failed}"


def measured(form: str, name: str, test: str) -> str:
    """The range of what was measured, in Python's format ``form``, of all seeds and all tests that begin like that."""
    found = [told[name] for key, told in _proved()["measured"].items() if key.startswith(test) and name in told]
    values = [float(value) for values in found for value in values.split()]
    if not values:
        return "**not measured**"
    return _range(*(f"{value:{form}}".replace("%", " %").replace("-", "−") for value in (min(values), max(values))))


def _range(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _proved() -> Run:
    return json.loads((DOCS / "assets" / "exact" / "results.json").read_text())


def _seeds_of(proved: Run) -> str:
    many = f"{proved['seeds']} seeds" if proved["seeds"] > 1 else "One seed"
    return f"{many}, {proved['date']}, {proved['machine']}"


def _values_of(rows: list[Run]) -> str:
    """The range of all values, and whether a test failed."""
    values = [value for row in rows for value in row["values"]]
    told = [f"{100 * value:.2g} %" if rows[0]["percent"] else f"{value:.4g}" for value in (min(values), max(values))]
    failed = " **failed**" if any(row["outcome"] == "failed" for row in rows) else ""
    return _range(*told) + failed


def _results(name: str) -> list[Run]:
    path = DOCS / "assets" / "comparison" / name
    return json.loads(path.read_text()) if path.exists() else []


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"the mean of {count} seeds"


def _mean(runs: list[Run], value: Callable[[Run], float]) -> float:
    return fmean(value(run) for run in runs)


def algorithm_names() -> Iterator[str]:
    """Every name of `rlalign algorithms list`, with the page that tells of it."""
    yield "| algorithm | what it is | presets |"
    yield "|---|---|---|"
    for name in plugins.names("algorithm"):
        module = plugins.load("algorithm", name)
        about = (module.__doc__ or "").partition("\n\n")[0]
        page = (DOCS / "algorithms" / f"{name}.md").read_text()
        presets = [
            f"[`{preset}`]({name}.md#{preset})" if f"### {preset}\n" in page else _code(preset)
            for preset in getattr(module, "PRESETS", {})
        ]
        yield f"| [`{name}`]({name}.md) | {_cell(about)} | {', '.join(presets)} |"


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


def families() -> Iterator[str]:
    """One row a file: its first sentence, and what its class says about itself."""
    yield "| family | model | pipeline of diffusers | the net predicts | guidance | LoRA on |"
    yield "|---|---|---|---|---|---|"
    for name in plugins.names("model"):
        module = plugins.load("model", name)
        about, family = (module.__doc__ or "").partition("\n")[0], module.Family
        classes = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, DiffusionPipeline)]
        pipelines = [one.__name__ for one in classes if one is not DiffusionPipeline or len(classes) == 1]
        targets = dict.fromkeys(re.sub(r"blocks\.\d+\.", "blocks.*.", target) for target in family.lora_targets)
        plain = family.guide is classifier_free_guidance
        cells = (
            _code(name),
            _cell(about),
            ", ".join(map(_code, pipelines)) or "none",
            vars(family).get("prediction", "what its scheduler says"),
            "classifier-free" if plain else _cell((family.guide.__doc__ or "").partition("\n")[0]),
            ", ".join(map(_code, targets)),
        )
        yield f"| {' | '.join(cells)} |"


MEASURED = {
    "parity": "picture, to the pipeline's",
    "lora": "exported LoRA",
    "folder": "exported folder",
    "ratio": "ratio, trained in float32",
    "bfloat16_same_shape": "bfloat16",
    "float32_row_by_row": "float32, row by row",
    "bfloat16_row_by_row": "bfloat16, row by row",
    "bfloat16_under_float32": "bfloat16 under float32",
}
"""What `make families` measured, and the heads of its columns."""


def families_tested() -> Iterator[str]:
    """The largest value of each number over a family's tests; a file's lines of code, and their median."""
    told = json.loads((DOCS / "assets" / "families.json").read_text())
    found: dict[str, dict[str, float]] = told["families"]
    yield f"| family | {' | '.join(MEASURED.values())} | steps of GRPO, NFT | code lines |"
    yield "|---" * (len(MEASURED) + 3) + "|"
    for name, own in found.items():
        cells = [f"{own[key]:.1g}" if key in own else "" for key in MEASURED]
        steps = f"{own['grpo_steps']:.0f}, {own['nft_steps']:.0f}"
        yield f"| {_code(name)} | {' | '.join(cells)} | {steps} | {own['lines']:.0f} |"
    lines = [own["lines"] for own in found.values()]
    yield ""
    yield f"{told['about']}. The median of the code lines is {median(lines):g}, the most {max(lines):.0f}."


def family_keys() -> Iterator[str]:
    """The keys of all families that have some."""
    yield "| family | key | values | default | meaning |"
    yield "|---|---|---|---|---|"
    for name in plugins.names("model"):
        rows = [*keys(plugins.load("model", name).Config)][2:]
        yield from (f"| {_code(name)} {row}" for row in rows)


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
