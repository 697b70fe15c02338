"""Does the picture show exactly the asked composition? Read off the pixels, after GenEval (https://arxiv.org/abs/2310.11513).

The alphabet of scenes, colours and shapes, stands here; the scene generator of `rlalign.zoo` draws with the same one.
Prompts carry GenEval's metadata: {"tag": "position", "include": [{"class": "square", "count": 1, "color": "blue"},
{"class": "circle", "count": 1, "color": "red", "position": ["above", 0]}]}: the circle is above include[0].
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from rlalign.types import Prompt

Array = NDArray[Any]
Include = Sequence[dict[str, Any]]

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 200, 20),
    "purple": (150, 40, 190),
    "cyan": (30, 190, 210),
    "black": (30, 30, 30),
}

# Inside the shape? u runs right and v down, both over [-1, 1] in the shape's bounding box.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: u**2 + v**2 <= 1,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 1,
    "triangle": lambda u, v: (abs(u) <= (v + 1) / 2) & (v <= 1),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 1 / 3) & (np.maximum(abs(u), abs(v)) <= 1),
}

# Which way each relation points, in picture coordinates (right, down).
RELATIONS: dict[str, tuple[int, int]] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}

_MIN_AREA = 12  # pixels; the smallest drawn object covers 36, a speck of the decoder a few
_MIN_OVERLAP = 0.7  # intersection over union with the best template; drawn shapes reach 0.85 and more
_MIN_PAPER = 180  # the background is light; a picture on anything else shows nothing
_MAX_RESIDUAL = 80.0  # colour distance (0..441) to the line from paper to ink
_MIN_OFFSET = 3.0  # pixels between two centres along the relation's axis
_MAX_THINGS = 6  # the largest things that partial credit tries to match


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured blob: `shape` is None where no template fits, (x, y) the centre of its bounding box in pixels."""

    shape: str | None
    color: str
    x: float
    y: float
    area: int


def composition(images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """1 where the picture shows the asked objects and nothing else, 0 elsewhere. images: uint8 [B, 3, H, W]

    Score: 0 or 1, its mean the accuracy; the details task/... split it by GenEval's six tasks. The prompt's metadata
    holds `tag` and `include` as in GenEval (https://arxiv.org/abs/2310.11513), with the zoo's shapes as classes.
    Known hacks: none found on the zoo's own pictures. It reads flat shapes of seven inks on light paper and is blind to
    everything else: photographs score 0, texture within a shape does not count.
    """
    includes = _includes(prompts)
    scenes = read_scenes(images)
    score = torch.tensor([float(shows(*pair)) for pair in zip(scenes, includes, strict=True)])  # [B]
    return {"score": score} | _by_task(score, prompts)


def partial(images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """A denser signal in [0, 1]: the share of asked properties found, times how well the number of objects agrees."""
    includes = _includes(prompts)
    scenes = read_scenes(images)
    score = torch.tensor([share_shown(*pair) for pair in zip(scenes, includes, strict=True)])  # [B]
    return {"score": score, "strict": (score == 1).float()} | _by_task(score, prompts)


def read_scenes(images: Tensor) -> list[list[Thing]]:
    """The things in each picture, by colour and connected components, largest first. images: uint8 [B, 3, H, W]."""
    inked = _inked(images.cpu().numpy())  # [B, colour, H, W]
    # Neighbours within one picture and one colour only: the structure has no extent along the first two axes.
    structure = np.zeros((3, 3, 3, 3), dtype=bool)
    structure[1, 1] = ndimage.generate_binary_structure(2, 1)
    labels, _ = ndimage.label(inked, structure)
    scenes: list[list[Thing]] = [[] for _ in range(len(inked))]
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box][0, 0] == label
        if mask.sum() >= _MIN_AREA:
            scenes[box[0].start].append(_thing(mask, box))
    return [sorted(scene, key=lambda thing: -thing.area) for scene in scenes]


def shows(scene: Sequence[Thing], include: Include) -> bool:
    """Some one-to-one assignment of things to asked objects satisfies everything, and nothing is left over."""
    slots = _slots(include)
    if len(scene) != len(slots):
        return False
    return any(all(_checks(order, slots, include)) for order in permutations(scene))


def share_shown(scene: Sequence[Thing], include: Include) -> float:
    """The best assignment's share of satisfied checks, times min(found, asked) / max(found, asked)."""
    slots = _slots(include)
    things = [*scene[:_MAX_THINGS], *[None] * max(0, len(slots) - len(scene))]
    best = max(np.mean(list(_checks(order, slots, include))) for order in permutations(things, len(slots)))
    return float(best) * min(len(scene), len(slots)) / max(len(scene), len(slots))


def _includes(prompts: Sequence[Prompt]) -> list[Include]:
    missing = next((prompt.text for prompt in prompts if not prompt.metadata.get("include")), None)
    if missing is not None:
        raise ValueError(f"composition needs GenEval metadata with 'include' on every prompt; {missing!r} has none")
    return [prompt.metadata["include"] for prompt in prompts]


def _by_task(score: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """Per task the scores of its pictures, NaN for those of other tasks, so that a nanmean is the task's accuracy."""
    tags = [prompt.metadata.get("tag") for prompt in prompts]
    nan = torch.full_like(score, torch.nan)
    return {f"task/{task}": torch.where(torch.tensor([tag == task for tag in tags]), score, nan) for task in TASKS}


def _inked(images: Array) -> Array:
    """Which pixels hold which ink: paper + cover * (ink - paper) with cover over a half. bool [B, colour, H, W]"""
    pixels = images.astype(np.float32)  # [B, 3, H, W]
    border = np.concatenate([pixels[..., 0, :], pixels[..., -1, :], pixels[..., 0], pixels[..., -1]], axis=-1)
    paper = np.median(border, axis=-1)  # [B, 3]
    inks = np.array(list(PALETTE.values()), dtype=np.float32)  # [colour, 3]
    ray = inks - paper[:, None]  # [B, colour, 3]
    offset = pixels - paper[:, :, None, None]
    along = np.einsum("bkc,bchw->bkhw", ray, offset)
    length = (ray**2).sum(-1)[..., None, None]  # [B, colour, 1, 1]
    cover = (along / length.clip(1)).clip(0, 1)
    residual = (offset**2).sum(1)[:, None] - 2 * cover * along + cover**2 * length  # |offset - cover * ray|^2
    nearest = residual == residual.min(axis=1, keepdims=True)
    light = (paper.min(axis=1) >= _MIN_PAPER)[:, None, None, None]
    return nearest & (cover > 0.5) & (residual < _MAX_RESIDUAL**2) & light


def _thing(mask: Array, box: tuple[slice, ...]) -> Thing:
    """mask: [h, w] within the box (picture, colour, rows, columns)."""
    _, color, rows, columns = box
    return Thing(
        shape=_shape(mask),
        color=list(PALETTE)[color.start],
        x=(columns.start + columns.stop) / 2,
        y=(rows.start + rows.stop) / 2,
        area=int(mask.sum()),
    )


def _shape(mask: Array) -> str | None:
    """The template with the largest intersection over union, if that is large enough and the box roughly square."""
    height, width = mask.shape
    if max(height, width) > 1.5 * min(height, width):
        return None
    templates = _templates(height, width)  # [shape, h, w]
    overlap = (templates & mask).sum((1, 2)) / (templates | mask).sum((1, 2))
    best = int(overlap.argmax())
    return list(SHAPES)[best] if overlap[best] >= _MIN_OVERLAP else None


@lru_cache(maxsize=4096)
def _templates(height: int, width: int) -> Array:
    """Every shape filling a box of this many pixels: pixels at least half covered, by 8x8 samples each."""
    v, u = (2 * (np.arange(8 * size) + 0.5) / (8 * size) - 1 for size in (height, width))
    fine = np.stack([np.broadcast_to(inside(u, v[:, None]), (8 * height, 8 * width)) for inside in SHAPES.values()])
    return fine.reshape(-1, height, 8, width, 8).mean((2, 4)) >= 0.5


def _slots(include: Include) -> list[int]:
    """One entry per asked object: the index of its item."""
    return [index for index, item in enumerate(include) for _ in range(item.get("count", 1))]


def _checks(things: Sequence[Thing | None], slots: Sequence[int], include: Include) -> Iterable[bool]:
    """Every asked property in turn: each object's shape, its colour if asked, its relation to every reference."""
    for thing, slot in zip(things, slots, strict=True):
        item = include[slot]
        yield thing is not None and thing.shape == item["class"]
        if "color" in item:
            yield thing is not None and thing.color == item["color"]
        if "position" in item:
            relation, reference = item["position"]
            others = [other for other, index in zip(things, slots, strict=True) if index == reference]
            yield all(thing and other and related(thing, relation, other) for other in others)


def related(thing: Thing, relation: str, other: Thing) -> bool:
    """The larger offset between the centres points the relation's way, by a few pixels."""
    right, down = RELATIONS[relation]
    dx, dy = thing.x - other.x, thing.y - other.y
    along, across = dx * right + dy * down, dx * down + dy * right
    return along >= _MIN_OFFSET and along > abs(across)
