"""Prompt sets: de-duplicated; which prompts a step uses is a pure function of (seed, step).

With ``rollout.source: data`` a prompt's metadata also records images and what they were scored:
{"text": "a red circle", "metadata": {"images": ["0.png", "1.png"], "scores": [1, 0]}}, paths from the file's folder.
For models that start from an image or a video a line names its files, which are opened when a step takes the prompt:
{"text": "make it blue", "image": "red.png"} or {"text": ..., "video": ["0.png", "1.png"]}, the frames.
A line may have a weight, {"text": ..., "weight": 2}: the prompt is drawn twice as often as one without.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from rlalign.mdp.noise import Noise
from rlalign.prompts.curriculum import Weights, chosen
from rlalign.prompts.files import read_file
from rlalign.prompts.images import read_image
from rlalign.prompts.rows import Row, is_number
from rlalign.types import Prompt, Size


@dataclass(frozen=True, slots=True)
class PromptSet:
    prompts: tuple[Prompt, ...]
    places: tuple[str, ...] = ()  # where each stands, for messages
    folder: Path = Path()  # that paths in metadata count from
    size: Size | None = None  # that images of prompts are fitted into when a step takes them; None: they stay closed
    weights: Weights = field(default_factory=Weights)  # how often each is drawn

    @staticmethod
    def read(path: Path, size: Size | None = None) -> "PromptSet":
        """Of a .txt, .jsonl or .parquet file. ValueError in words."""
        return PromptSet.of(read_file(path), f"prompts file {path}", path.parent, size)

    @staticmethod
    def of(rows: Iterable[Row], name: str, folder: Path = Path(), size: Size | None = None) -> "PromptSet":
        """Each prompt once; ``name`` says what holds them, for messages."""
        unique: dict[str, Row] = {}
        for row in rows:
            unique.setdefault(prompt_key(row.prompt), row)
        if not unique:
            raise ValueError(f"{name} holds no prompts; write one a line")
        places, prompts, weights = zip(*unique.values(), strict=True)
        return PromptSet(prompts, places, folder, size, Weights(weights))

    def recorded(self, samples: int) -> "PromptSet":
        """The prompts with the paths of their images absolute; ValueError where one records fewer than ``samples``."""
        rows = zip(self.places, self.prompts, strict=True)
        return replace(self, prompts=tuple(_recorded(prompt, self.folder, samples, where) for where, prompt in rows))

    def require_images(self) -> None:
        """ValueError unless all files of a recorded set are there."""
        for where, prompt in zip(self.places, self.prompts, strict=True):
            for path in prompt.metadata["images"]:
                if not Path(path).is_file():
                    raise ValueError(f"{where}: there is no image {path}")

    def at(self, seed: int, step: int, count: int) -> tuple[Prompt, ...]:
        """The prompts of a step: windows of ``count`` over a fresh permutation an epoch, joined end to end.

        Where prompts have weights, draws in proportion to those of the step instead.
        """
        if not self.weights.uniform:
            return tuple(self._opened(i) for i in chosen(self.weights.at(step, self.prompts), Noise(seed), step, count))
        noise, size = Noise(seed), len(self.prompts)
        places = range(step * count, (step + 1) * count)
        orders = {epoch: noise.permutation("prompts", (epoch, 0, 0), size) for epoch in {p // size for p in places}}
        return tuple(self._opened(int(orders[place // size][place % size])) for place in places)

    def first(self, count: int) -> tuple[Prompt, ...]:
        """The first ``count``, going round when there are fewer."""
        return tuple(self._opened(i % len(self.prompts)) for i in range(count))

    def spread(self, count: int) -> tuple[Prompt, ...]:
        """``count`` of them from all over the file, which may be sorted by task; going round when there are fewer."""
        if count >= len(self.prompts):
            return self.first(count)
        return tuple(self._opened(index) for index in evenly(len(self.prompts), count))

    def _opened(self, index: int) -> Prompt:
        prompt, size = self.prompts[index], self.size
        if size is None or not prompt.files:
            return prompt
        image, video = prompt.files.get("image"), prompt.files.get("video")
        frames = [read_image(frame, size) for frame in video or ()]
        return replace(
            prompt,
            image=prompt.image if image is None else read_image(image, size),
            video=torch.stack(frames) if frames else prompt.video,
        )


def evenly(number: int, wanted: int) -> tuple[int, ...]:
    """At most ``wanted`` of the places 0..number-1, at even distances."""
    count = min(number, wanted)
    return tuple(number * i // count for i in range(count))


def drawn(prompts: Sequence[Prompt], samples: int, seed: int, step: int) -> tuple[Prompt, ...]:
    """Recorded prompts with ``samples`` of their images each, drawn anew every step where there are more."""
    return tuple(_drawn(prompt, samples, Noise(seed), (step, group, 0)) for group, prompt in enumerate(prompts))


def _drawn(prompt: Prompt, samples: int, noise: Noise, address: tuple[int, int, int]) -> Prompt:
    images, scores = prompt.metadata["images"], prompt.metadata["scores"]
    if len(images) == samples:
        return prompt
    chosen = noise.permutation("recorded", address, len(images))[:samples].sort().values.tolist()
    own = {"images": [images[i] for i in chosen], "scores": [scores[i] for i in chosen]}
    return replace(prompt, metadata={**prompt.metadata, **own})


def _recorded(prompt: Prompt, folder: Path, samples: int, where: str) -> Prompt:
    images, scores = (prompt.metadata.get(key) for key in ("images", "scores"))
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f'{where}: rollout.source: data needs metadata "images", paths from {folder}; write .jsonl')
    if not isinstance(scores, list) or not all(is_number(score) for score in scores) or len(scores) != len(images):
        raise ValueError(f'{where}: metadata "scores" must be a list of as many numbers as there are images')
    if len(images) < samples:
        raise ValueError(
            f"{where} records {len(images)} images, fewer than rollout.samples_per_prompt {samples}; take the line "
            f"out, or lower that"
        )
    paths = [str((folder / path).absolute()) for path in images]
    return replace(prompt, metadata={**prompt.metadata, "images": paths})


def prompt_key(prompt: Prompt) -> str:
    """Equal for two lines that say the same to the letter."""
    return json.dumps([prompt.text, prompt.negative, prompt.metadata, prompt.files], sort_keys=True, default=str)
