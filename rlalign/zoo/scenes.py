"""Captioned scenes: coloured shapes for GenEval's six tasks, and short rendered words or numbers.

A scene is asked for by GenEval metadata; `caption` puts it in words and `draw` paints it. The same composition has
many pictures: sizes, places, tints and whatever the metadata leaves open are drawn from the generator.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from rlalign_rewards.composition import PALETTE, RELATIONS, SHAPES

Array = NDArray[Any]
Metadata = dict[str, Any]
Box = tuple[float, float, float]  # centre x, centre y, size, in pixels

SIZE = 32
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
WORDS = """
    ACE ARM ART BAG BAT BIG BOX BUS CAB CAN CAP CAR CAT COW CUP DAY DIG DOG DOT EAR EGG EYE FAN FAR FIG FUN GAS
    GEM GUM HAT HEN HID HOP HOT HUT ICE INK JAM JAR JET KEY KID KIT LAB LID LIP LOG MAN MAP MIX MUD NET NEW NUT
    OAK OIL OUR OWL PAN PEN PIE PIG POT RAT RAY RUG RUN SEA SKY SUN TAB TAX TOP TOY VAN WAX WIN ZIP ZOO
""".split()  # noqa: SIM905 (a table of words reads better than a list of strings)
NUMBERS = [str(number) for number in range(1000)]

_SAMPLES = 4  # per pixel and axis
_LAYOUTS = 32  # tried at once; one in ten or more of four objects qualifies
_MARGIN = 1.0  # pixels between objects and the picture's edge
_GAP = 2.0  # pixels between two objects' boxes
_SIZES = {1: (11.0, 17.0), 2: (10.0, 14.0), 3: (9.0, 12.0), 4: (9.0, 11.0)}  # by number of objects
_TEXT_WIDTH = 28
_INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def compositions(task: str) -> Iterator[Metadata]:
    """Every composition of a task; pairs that differ in both shape and colour, in both orders of words."""
    objects = [{"class": shape, "count": 1, "color": color} for shape, color in product(SHAPES, PALETTE)]
    pairs = [(a, b) for a, b in permutations(objects, 2) if a["class"] != b["class"] and a["color"] != b["color"]]
    includes: dict[str, Iterator[list[Metadata]]] = {
        "single_object": ([{"class": shape, "count": 1}] for shape in SHAPES),
        "two_object": ([{"class": a, "count": 1}, {"class": b, "count": 1}] for a, b in permutations(SHAPES, 2)),
        "counting": (
            [{"class": shape, "count": count} | ({"color": color} if color else {})]
            for shape, count, color in product(SHAPES, (2, 3, 4), (None, *PALETTE))
        ),
        "colors": ([item] for item in objects),
        "position": ([b, a | {"position": [relation, 0]}] for (a, b), relation in product(pairs, RELATIONS)),
        "color_attr": ([a, b] for a, b in pairs),
    }
    return ({"tag": task, "include": include} for include in includes[task])


def composition_key(metadata: Metadata) -> tuple[Any, ...]:
    """Equal for two wordings of one scene: objects in any order, "a left of b" as "b right of a"."""
    objects = [(item["class"], item["count"], item.get("color", "")) for item in metadata["include"]]
    if metadata["tag"] != "position":
        return (*sorted(objects),)
    relation, reference = metadata["include"][1]["position"]
    first, second = objects[1], objects[reference]
    return (relation, first, second) if relation in ("left of", "above") else (_INVERSE[relation], second, first)


def caption(metadata: Metadata) -> str:
    """The prompt in words: "two red circles", "a red circle left of a blue square", 'the text "42"'."""
    if metadata["tag"] == "text":
        return f'the text "{metadata["text"]}"'
    phrases = [_phrase(item) for item in metadata["include"]]
    if metadata["tag"] == "position":
        return f"{phrases[1]} {metadata['include'][1]['position'][0]} {phrases[0]}"
    return " and ".join(phrases)


def _phrase(item: Metadata) -> str:
    noun = item["class"] if item["count"] == 1 else plural(item["class"])
    return " ".join(word for word in (COUNTS[item["count"]], item.get("color", ""), noun) if word)


def plural(noun: str) -> str:
    """crosses, squares."""
    return noun + ("es" if noun.endswith("s") else "s")


def draw(metadata: Metadata, rng: np.random.Generator) -> Array:
    """One picture of what the metadata asks for, and of nothing else. uint8 [H, W, 3]"""
    if metadata["tag"] == "text":
        return _draw_text(metadata["text"], rng)
    items = [item for item in metadata["include"] for _ in range(item["count"])]
    picture = _paper(rng)
    for item, box in zip(items, _place(metadata, len(items), rng), strict=True):
        color = item.get("color") or str(rng.choice(list(PALETTE)))
        cover, where = coverage(item["class"], box)
        _paint(picture[where], cover, _tint(color, rng))
    return picture.round().astype(np.uint8)


def coverage(shape: str, box: Box) -> tuple[Array, tuple[slice, slice]]:
    """The share of every pixel that the shape covers, and the rows and columns these pixels stand in. float [h, w]"""
    x, y, size = box
    rows, columns = (slice(int(centre - size / 2), int(centre + size / 2) + 1) for centre in (y, x))
    v, u = (2 * (_samples(span) - centre) / size for span, centre in ((rows, y), (columns, x)))
    inside = SHAPES[shape](u, v[:, None])
    return inside.reshape(len(v) // _SAMPLES, _SAMPLES, len(u) // _SAMPLES, _SAMPLES).mean((1, 3)), (rows, columns)


def _samples(span: slice) -> Array:
    """Positions of the samples within a span of pixels."""
    return span.start + (np.arange((span.stop - span.start) * _SAMPLES) + 0.5) / _SAMPLES


def _place(metadata: Metadata, num_objects: int, rng: np.random.Generator) -> list[Box]:
    """Boxes apart from each other that stand in the asked relation: the first of many layouts that qualifies."""
    while True:
        sizes = rng.uniform(*_SIZES[num_objects], (_LAYOUTS, 1, num_objects))
        reach = sizes / 2 + _MARGIN
        centres = rng.uniform(reach, SIZE - reach, (_LAYOUTS, 2, num_objects))  # [layout, x and y, object]
        good = np.flatnonzero(_apart(centres, sizes) & _relates(centres, metadata))
        if len(good):
            (xs, ys), (size,) = centres[good[0]], sizes[good[0]]
            return [(float(x), float(y), float(s)) for x, y, s in zip(xs, ys, size, strict=True)]


def _apart(centres: Array, sizes: Array) -> Array:
    """Which layouts leave a gap between all boxes. bool [layout]"""
    first, second = np.triu_indices(sizes.shape[-1], k=1)
    distance = np.abs(centres[..., first] - centres[..., second]).max(axis=1)  # [layout, pair]
    return (distance >= (sizes[:, 0, first] + sizes[:, 0, second]) / 2 + _GAP).all(axis=-1)


def _relates(centres: Array, metadata: Metadata) -> Array:
    """Where the offset along the relation's axis is at least one and a half times the other. bool [layout]"""
    if metadata["tag"] != "position":
        return np.ones(len(centres), dtype=bool)
    relation, reference = metadata["include"][1]["position"]
    right, down = RELATIONS[relation]
    dx, dy = (centres[..., 1] - centres[..., reference]).T
    return dx * right + dy * down >= 1.5 * abs(dx * down + dy * right)


def _paper(rng: np.random.Generator) -> Array:
    """A nearly white background with a faint tint. float [H, W, 3]"""
    tint = rng.uniform(240, 255) - rng.uniform(0, 6, 3)
    return np.broadcast_to(tint, (SIZE, SIZE, 3)).copy()


def _tint(color: str, rng: np.random.Generator) -> Array:
    return (np.array(PALETTE[color]) + rng.uniform(-10, 10, 3)).clip(0, 255)


def _paint(picture: Array, cover: Array, ink: Array) -> None:
    picture += cover[..., None] * (ink - picture)


def _draw_text(text: str, rng: np.random.Generator) -> Array:
    """Black letters near the middle, as large as fits."""
    size = next(size for size in range(17, 6, -1) if _font(size).getlength(text) <= _TEXT_WIDTH)
    room = (_TEXT_WIDTH - _font(size).getlength(text)) / 2
    centre = SIZE / 2 + rng.uniform(-1, 1, 2) * (min(room + 1, 5), 5)
    stencil = Image.new("L", (SIZE, SIZE), 0)
    ImageDraw.Draw(stencil).text((centre[0], centre[1]), text, font=_font(size), fill=255, anchor="mm")
    picture = _paper(rng)
    _paint(picture, np.asarray(stencil) / 255, _tint("black", rng))
    return picture.round().astype(np.uint8)


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in face, which text recognisers read well from 13 pixels on."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font
