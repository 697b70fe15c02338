"""evaluate: the loop's own evaluation, of a run's newest checkpoint or of a run file's untrained model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from rlalign.build import build
from rlalign.commands.problems import in_preparation, in_training
from rlalign.commands.runs import Weights, config_of, is_run, newest
from rlalign.config import RunConfig
from rlalign.evaluation.distance import ENOUGH_FOR_FID, distance, require_enough
from rlalign.evaluation.features import Features, features_of, read_network
from rlalign.evaluation.heldout import base_pictures
from rlalign.evaluation.heldout import evaluate as evaluate_heldout
from rlalign.files import write_atomically
from rlalign.loop import Parts
from rlalign.prompts import PromptSet, read, read_image
from rlalign.prompts.sources import Part
from rlalign.reporting.grids import GRID, save_grid
from rlalign.types import Size

BASE = "base"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for."""

    target: str
    overrides: Sequence[str]
    weights: Weights | None = None
    to: Path | None = None
    features: Path | None = None
    reference: str | None = None
    part: Part = "heldout"


def evaluate(wish: Wish) -> int:
    with ExitStack() as stack:
        return _evaluate(wish, stack)


def _evaluate(wish: Wish, stack: ExitStack) -> int:
    with in_preparation():
        chosen = [f"evaluation.weights={wish.weights}"] if wish.weights else []
        config = config_of(wish.target, [*wish.overrides, *chosen])
        network, reference = _comparison(wish, config)
        prompts = read(config.prompts, wish.part, Size(*config.rollout.size))
        parts, _ = build(config)
        stack.callback(parts.runtime.close)
        step = 0
        if is_run(wish.target):
            step, path = newest(Path(wish.target))
            parts.learners.get(parts.learners.broadcast("load", path))
        folder = wish.to or _free_folder(wish, step)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a folder with --to")
    own: list[Tensor] = []
    with in_training():
        parts.publisher.publish(parts.learners, parts.samplers, version=step)
        held_out = (parts.samplers, parts.scorers, prompts, config.evaluation, config.rollout)
        seen = (lambda pictures: own.append(features_of(network, _stills(pictures)))) if network else None
        result = evaluate_heldout(*held_out, seen=seen)
    used = config.evaluation
    told: dict[str, object] = {"of": wish.target, "step": step, "prompts": wish.part}
    told |= {"weights": used.weights, "images": used.num_images, "overrides": [*wish.overrides]}
    told["evaluation"] = used.model_dump(mode="json", exclude={"every"})
    metrics = dict(result.metrics)
    with in_preparation():
        folder.mkdir(parents=True, exist_ok=True)
        save_grid(result.pictures, result.captions, folder / GRID)
        _write(folder, told, metrics)  # before anything that may yet go wrong
    if network:
        with in_training():
            if reference is None:
                reference = features_of(network, _of_base(parts, prompts, config))
        apart = distance(reference, torch.cat(own), config.seed)
        metrics |= {"fid": apart.fid, "kid": apart.kid, "kid/std": apart.kid_std}
        told |= {"reference": wish.reference or BASE, "features": str(wish.features)}
        told["reference_images"] = len(reference)
        with in_preparation():
            _write(folder, told, metrics)
    print(f"{wish.target} after {step} updates, weights: {used.weights}, {used.num_images} images")
    print(f"prompts      {wish.part}, {-(-used.num_images // used.samples_per_prompt)} of them")
    for name, value in metrics.items():
        print(f"{name:40} {value:.4f}")
    if network and used.num_images < ENOUGH_FOR_FID:
        print(f"fid is too large with fewer than {ENOUGH_FOR_FID:,} images: compare it at equal numbers, or read kid")
    print(f"written      {folder / 'metrics.json'} and {folder / GRID}")
    return 0


def _free_folder(wish: Wish, step: int) -> Path:
    """No other evaluation's, which may have been made with other settings."""
    target = Path(wish.target).absolute()
    name = target.name if is_run(wish.target) else target.stem
    name = f"{name}_step_{step:06d}" + ("" if wish.part == "heldout" else f"_{wish.part}")
    names = (name if number == 1 else f"{name}_{number}" for number in count(1))
    return next(folder for each in names if not (folder := Path("evaluations") / each).exists())


def _write(folder: Path, told: Mapping[str, object], metrics: Mapping[str, float]) -> None:
    numbers = {name: value if isfinite(value) else None for name, value in metrics.items()}
    write_atomically(folder / "metrics.json", json.dumps({**told, **numbers}, indent=2).encode())


def _comparison(wish: Wish, config: RunConfig) -> tuple[Features | None, Tensor | None]:
    """The network, and the features of the reference pictures, None where those are the base model's."""
    if wish.features is None:
        if wish.reference is not None:
            raise ValueError("--reference is compared by the features of a network: name it with --features PATH")
        return None, None
    of_folder = wish.reference not in (None, BASE)
    files = _pictures(str(wish.reference)) if of_folder else []
    require_enough(config.evaluation.num_images, len(files) if of_folder else config.evaluation.num_images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = read_network(wish.features.expanduser(), device)
    size = Size(*config.rollout.size)
    return network, features_of(network, (read_image(path, size) for path in files)) if of_folder else None


def _pictures(reference: str) -> list[Path]:
    """Of a folder, without rlalign's own contact sheets."""
    found = sorted(path for path in Path(reference).expanduser().rglob("*") if path.suffix.lower() in PICTURES)
    files = [path for path in found if path.name != GRID]
    if not files:
        raise ValueError(f"--reference {reference}: there are no pictures in that folder; or name it base")
    return files


def _of_base(parts: Parts, prompts: PromptSet, config: RunConfig) -> Iterator[Tensor]:
    """Pictures [3, H, W]."""
    for pictures in base_pictures(parts.samplers, prompts, config.evaluation, config.rollout):
        yield from _stills(pictures)


def _stills(pictures: Tensor) -> Tensor:
    """Of films their middle frame [B, 3, H, W]."""
    return pictures[:, pictures.shape[1] // 2] if pictures.ndim == 5 else pictures
