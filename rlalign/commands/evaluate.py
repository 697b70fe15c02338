"""evaluate: the loop's own evaluation, of a run's newest checkpoint or of a run file's untrained model."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from rlalign.build import build
from rlalign.commands.problems import in_preparation, in_training
from rlalign.commands.runs import Weights, config_of, is_run, newest
from rlalign.config import RunConfig
from rlalign.evaluation.distance import ENOUGH_FOR_FID, distance
from rlalign.evaluation.features import Features, features_of, read_network
from rlalign.evaluation.heldout import base_pictures
from rlalign.evaluation.heldout import evaluate as evaluate_heldout
from rlalign.files import write_atomically
from rlalign.loop import Parts
from rlalign.prompts import PromptSet, read, read_image
from rlalign.prompts.sources import Part
from rlalign.reporting.grids import save_grid
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
        network, files = _comparison(wish)
        prompts = read(config.prompts, wish.part, Size(*config.rollout.size))
        parts, _ = build(config)
        stack.callback(parts.runtime.close)
        step = 0
        if is_run(wish.target):
            step, path = newest(Path(wish.target))
            parts.learners.get(parts.learners.broadcast("load", path))
        suffix = "" if wish.part == "heldout" else f"_{wish.part}"
        folder = wish.to or Path("evaluations") / f"{Path(wish.target).stem}_step_{step:06d}{suffix}"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a folder with --to")
    own: list[Tensor] = []
    with in_training():
        parts.publisher.publish(parts.learners, parts.samplers, version=step)
        held_out = (parts.samplers, parts.scorers, prompts, config.evaluation, config.rollout)
        seen = (lambda pictures: own.append(features_of(network, _stills(pictures)))) if network else None
        result = evaluate_heldout(*held_out, seen=seen)
    used = config.evaluation
    metrics, about = dict(result.metrics), dict[str, object]()
    if network:
        with in_preparation():
            reference = features_of(network, _reference(parts, prompts, config, files))
            apart = distance(reference, torch.cat(own), config.seed)
        metrics |= {"fid": apart.fid, "kid": apart.kid, "kid/std": apart.kid_std}
        about = {
            "reference": wish.reference or BASE,
            "features": str(wish.features),
            "reference_images": len(reference),
        }
    with in_preparation():
        folder.mkdir(parents=True, exist_ok=True)
        save_grid(result.pictures, result.captions, folder / "grid.png")
        settings_used = {"prompts": wish.part, "weights": used.weights, "images": used.num_images, **about}
        numbers = {name: value if isfinite(value) else None for name, value in metrics.items()}
        write_atomically(
            folder / "metrics.json",
            json.dumps({"of": wish.target, "step": step, **settings_used, **numbers}, indent=2).encode(),
        )
    print(f"{wish.target} after {step} updates, weights: {used.weights}, {used.num_images} images")
    print(f"prompts      {wish.part}, {-(-used.num_images // used.samples_per_prompt)} of them")
    for name, value in metrics.items():
        print(f"{name:40} {value:.4f}")
    if network and len(torch.cat(own)) < ENOUGH_FOR_FID:
        print(f"fid is too large with fewer than {ENOUGH_FOR_FID:,} images: compare it at equal numbers, or read kid")
    print(f"written      {folder / 'metrics.json'} and {folder / 'grid.png'}")
    return 0


def _comparison(wish: Wish) -> tuple[Features | None, list[Path]]:
    """The network and the reference pictures, none where they are the base model's."""
    if wish.features is None:
        if wish.reference is not None:
            raise ValueError("--reference is compared by the features of a network: name it with --features PATH")
        return None, []
    files: list[Path] = []
    if wish.reference not in (None, BASE):
        folder = Path(wish.reference).expanduser()
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
        if not files:
            raise ValueError(f"--reference {wish.reference}: there are no pictures in that folder; or name it base")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return read_network(wish.features.expanduser(), device), files


def _reference(parts: Parts, prompts: PromptSet, config: RunConfig, files: Sequence[Path]) -> Iterator[Tensor]:
    """Pictures [3, H, W] of the run's size."""
    if files:
        yield from (read_image(path, Size(*config.rollout.size)) for path in files)
    else:
        for pictures in base_pictures(parts.samplers, prompts, config.evaluation, config.rollout):
            yield from _stills(pictures)


def _stills(pictures: Tensor) -> Tensor:
    """Of films their middle frame [B, 3, H, W]."""
    return pictures[:, pictures.shape[1] // 2] if pictures.ndim == 5 else pictures
