"""Prompt sets: read once, de-duplicated; which prompts a step uses is a pure function of (seed, step).

With ``rollout.source: data`` a prompt's metadata also records images and what they were scored:
{"text": "a red circle", "metadata": {"images": ["0.png", "1.png"], "scores": [1, 0]}}, paths from the file's folder.
For models that start from an image or a video a line names its files, which are opened when a step takes the prompt:
{"text": "make it blue", "image": "red.png"} or {"text": ..., "video": ["0.png", "1.png"]}, the frames.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rlalign.mdp.noise import Noise
from rlalign.types import Prompt, Size

Row = tuple[str, Prompt]  # where it stands, for messages


@dataclass(frozen=True, slots=True)
class PromptSet:
    prompts: tuple[Prompt, ...]
    places: tuple[str, ...] = ()  # where each stands, for messages
    folder: Path = Path()  # that paths in metadata count from
    size: Size | None = None  # that images of prompts are fitted into when a step takes them; None: they stay closed

    @staticmethod
    def read(path: Path, size: Size | None = None) -> "PromptSet":
        """A .txt (a prompt a line), .jsonl ({"text": ..., "metadata": {...}}) or .parquet file. ValueError in words."""
        if not path.is_file():
            raise ValueError(f"there is no prompts file {path}")
        readers = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
        if path.suffix not in readers:
            raise ValueError(f"prompts file {path} must end in {', '.join(readers)}")
        try:
            rows = readers[path.suffix](path)
        except UnicodeDecodeError as error:
            raise ValueError(f"prompts file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        unique: dict[str, Row] = {}
        for where, prompt in rows:
            unique.setdefault(prompt_key(prompt), (where, prompt))
        if not unique:
            raise ValueError(f"prompts file {path} holds no prompts; write one a line")
        places, prompts = zip(*unique.values(), strict=True)
        return PromptSet(prompts, places, path.parent, size)

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
        """The prompts of a step: windows of ``count`` over a fresh permutation an epoch, joined end to end."""
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


def read_image(path: str | Path, size: Size) -> Tensor:
    """[3, H, W] uint8, RGB, upright: scaled until it covers the size, its sides kept in proportion, the middle cut out.

    ValueError with the path when there is no such file or it is no image.
    """
    try:
        with Image.open(path) as file:
            upright = ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's own for what is damaged or huge
        raise ValueError(f"{path} cannot be read as an image: {error}") from OSError(str(error))
    fitted = ImageOps.fit(upright, (size.width, size.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def _recorded(prompt: Prompt, folder: Path, samples: int, where: str) -> Prompt:
    images, scores = (prompt.metadata.get(key) for key in ("images", "scores"))
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError(f'{where}: rollout.source: data needs metadata "images", paths from {folder}; write .jsonl')
    if not isinstance(scores, list) or not all(_is_number(score) for score in scores) or len(scores) != len(images):
        raise ValueError(f'{where}: metadata "scores" must be a list of as many numbers as there are images')
    if len(images) < samples:
        raise ValueError(
            f"{where} records {len(images)} images, fewer than rollout.samples_per_prompt {samples}; take the line "
            f"out, or lower that"
        )
    paths = [str((folder / path).absolute()) for path in images]
    return replace(prompt, metadata={**prompt.metadata, "images": paths})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def prompt_key(prompt: Prompt) -> str:
    return json.dumps([prompt.text, prompt.negative, prompt.metadata, prompt.files], sort_keys=True, default=str)


def stand_in(text: str, size: Size) -> Prompt:
    """With a grey image, and frames for a model of videos, so that every family can encode it."""
    grey = torch.full((size.frames, 3, size.height, size.width), 128, dtype=torch.uint8)
    return Prompt(text, image=grey[0], video=grey if size.frames > 1 else None)


def seen_by_model(prompt: Prompt) -> tuple[str, ...]:
    """A key of all that a model makes a sample from, images by their content; metadata is for rewards."""
    return prompt.text, repr(prompt.negative), _content(prompt.image), _content(prompt.video)


def _content(pixels: Tensor | None) -> str:
    if pixels is None:
        return ""
    return f"{list(pixels.shape)} {hashlib.sha256(pixels.cpu().contiguous().numpy().tobytes()).hexdigest()}"


def _read_text(path: Path) -> list[Row]:
    return [(where, Prompt(line.strip())) for where, line in _lines(path)]


def _read_jsonl(path: Path) -> list[Row]:
    return [(where, _prompt(_parsed(line, where), where, path.parent)) for where, line in _lines(path)]


def _lines(path: Path) -> list[tuple[str, str]]:
    """Lines that are not blank, as JSON counts them: U+2028 and its like may stand inside a text."""
    lines = enumerate(path.read_text("utf-8-sig").split("\n"), start=1)
    return [(f"{path}, line {n}", line) for n, line in lines if line.strip()]


def _read_parquet(path: Path) -> list[Row]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found]  # an optional reader
    except ModuleNotFoundError:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from None
    rows: Sequence[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return [(f"{path}, row {n}", _prompt(row, f"{path}, row {n}", path.parent)) for n, row in enumerate(rows)]


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from None


def _prompt(row: Any, where: str, folder: Path) -> Prompt:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f'{where} needs a "text" that is not empty, as in {{"text": "a red circle"}}')
    known = ("text", "negative", "metadata", "image", "video")
    strange = row.keys() - {*known}
    if strange:
        raise ValueError(f"{where} has the unknown key {sorted(strange)[0]!r}; known are {', '.join(known)}")
    if not isinstance(row.get("negative"), str | None) or not isinstance(row.get("metadata"), dict | None):
        raise ValueError(f"{where}: negative must be a text and metadata a mapping")
    return Prompt(row["text"], row.get("negative"), row.get("metadata") or {}, files=_files(row, where, folder))


def _files(row: dict[str, Any], where: str, folder: Path) -> dict[str, Any]:
    """Absolute paths of the image and of the video's frames, those of the two that the row has."""
    image, video = row.get("image"), row.get("video")
    frames = [] if video is None else video
    if not isinstance(image, str | None) or not isinstance(frames, list) or not all(isinstance(f, str) for f in frames):
        raise ValueError(f"{where}: image must be the path of one file and video a list of those of its frames")
    found: dict[str, Any] = {} if image is None else {"image": str((folder / image).absolute())}
    found |= {"video": [str((folder / frame).absolute()) for frame in frames]} if frames else {}
    for path in (*([found["image"]] if image else []), *found.get("video", [])):
        if not Path(path).is_file():
            raise ValueError(f"{where}: there is no image {path}")
    return found
