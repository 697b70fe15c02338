"""record: a model's pictures with their scores, in files that ``rollout.source: data`` trains on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from rlalign.build import load_policy, make_scorer
from rlalign.commands.problems import BadInput, in_preparation, in_training
from rlalign.commands.runs import Weights, config_of, is_run, trained
from rlalign.config import RunConfig
from rlalign.files import in_words, write_atomically
from rlalign.mdp.noise import Noise
from rlalign.pipeline import split
from rlalign.policy import Policy
from rlalign.prompts import read
from rlalign.rundir import RunDir
from rlalign.types import Scores, Size, Unit
from rlalign.workers.sampler import Sampler

FILE = "train.jsonl"


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for."""

    target: str
    overrides: Sequence[str]
    prompts: int
    num: int
    seed: int
    weights: Weights | None
    to: Path


def record(wish: Wish) -> int:
    with in_preparation():
        config, file = config_of(wish.target, wish.overrides), wish.to / FILE
        if file.exists():
            raise ValueError(f"{file} is there already; choose another folder with --to")
        known = read(config.prompts, "train", Size(*config.rollout.size))
        prompts = known.first(min(wish.prompts, len(known.prompts)))
        sampler, scorer = Sampler(_policy(config, wish), Noise(wish.seed), "policy", False, True), make_scorer(config)
        with in_words(f"write pictures into {wish.to}"):
            (wish.to / "images").mkdir(parents=True, exist_ok=True)
    plan, lines = config.evaluation.rollout(config.rollout), list[str]()
    with in_training():
        for unit in split(0, prompts, wish.num, plan.micro_batch, "record"):
            _, pictures = sampler.sample(unit, plan)
            lines.extend(_written(wish.to, unit, pictures, scorer.score(pictures, unit)))
        write_atomically(file, "\n".join(lines).encode())
    print(f"sampling     {plan.num_steps} steps of {plan.solver}, guidance {plan.guidance_scale:g}, seed {wish.seed}")
    print(f"recorded     {wish.num} pictures for each of {len(lines)} prompts in {file}")
    return 0


def _policy(config: RunConfig, wish: Wish) -> Policy:
    if not is_run(wish.target) or not RunDir(Path(wish.target)).info.exists():
        return load_policy(config)
    model = trained(Path(wish.target), config, wish.weights)
    if model.weights != "policy":
        model.policy.load("policy", model.policy.weights(model.weights))
    return model.policy


def _written(folder: Path, unit: Unit, pictures: Tensor, scores: Scores) -> Iterator[str]:
    """One line for each group in which every picture has its score."""
    if not scores.training or pictures.ndim != 4:
        raise BadInput("record needs a reward of role train that looks at pictures, and a model of single images")
    groups = zip(unit.groups, unit.prompts, pictures.unflatten(0, (-1, unit.samples)), strict=True)
    for place, (group, prompt, own) in enumerate(groups):
        if not scores.valid[place].all():
            continue
        names = [f"images/{group:06d}_{number}.png" for number in range(len(own))]
        with in_words(f"write pictures into {folder}"):
            for name, picture in zip(names, own, strict=True):
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name)
        found = {"images": names, "scores": scores.total[place].tolist()}
        row = {"text": prompt.text, "negative": prompt.negative, "metadata": {**prompt.metadata, **found}}
        yield json.dumps(row | dict(prompt.files), ensure_ascii=False)
