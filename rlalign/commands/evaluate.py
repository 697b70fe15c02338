"""evaluate: the loop's own evaluation, of a run's newest checkpoint or of a run file's untrained model."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from math import isfinite
from pathlib import Path

from rlalign.build import build
from rlalign.commands.problems import in_preparation, in_training
from rlalign.commands.runs import Weights, config_of, is_run, newest
from rlalign.evaluation.heldout import evaluate as evaluate_heldout
from rlalign.files import write_atomically
from rlalign.prompts import read
from rlalign.prompts.sources import Part
from rlalign.reporting.grids import save_grid
from rlalign.types import Size


def evaluate(
    target: str, overrides: Sequence[str], weights: Weights | None, to: Path | None, part: Part = "heldout"
) -> int:
    with ExitStack() as stack:
        return _evaluate(target, overrides, weights, to, part, stack)


def _evaluate(
    target: str, overrides: Sequence[str], weights: Weights | None, to: Path | None, part: Part, stack: ExitStack
) -> int:
    with in_preparation():
        chosen = [f"evaluation.weights={weights}"] if weights else []
        config = config_of(target, [*overrides, *chosen])
        prompts = read(config.prompts, part, Size(*config.rollout.size))
        parts, _ = build(config)
        stack.callback(parts.runtime.close)
        step = 0
        if is_run(target):
            step, path = newest(Path(target))
            parts.learners.get(parts.learners.broadcast("load", path))
        suffix = "" if part == "heldout" else f"_{part}"
        folder = to or Path("evaluations") / f"{Path(target).stem}_step_{step:06d}{suffix}"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a folder with --to")
    with in_training():
        parts.publisher.publish(parts.learners, parts.samplers, version=step)
        result = evaluate_heldout(parts.samplers, parts.scorers, prompts, config.evaluation, config.rollout)
    with in_preparation():
        folder.mkdir(parents=True, exist_ok=True)
        save_grid(result.pictures, result.captions, folder / "grid.png")
        settings_used = {"prompts": part, "weights": config.evaluation.weights, "images": config.evaluation.num_images}
        numbers = {name: value if isfinite(value) else None for name, value in result.metrics.items()}
        write_atomically(
            folder / "metrics.json",
            json.dumps({"of": target, "step": step, **settings_used, **numbers}, indent=2).encode(),
        )
    print(f"{target} after {step} updates, weights: {config.evaluation.weights}, {config.evaluation.num_images} images")
    print(f"prompts      {part}, the first {-(-config.evaluation.num_images // config.evaluation.samples_per_prompt)}")
    for name, value in result.metrics.items():
        print(f"{name:40} {value:.4f}")
    print(f"written      {folder / 'metrics.json'} and {folder / 'grid.png'}")
    return 0
