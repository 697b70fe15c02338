"""Picture grids: one row a prompt with its text above, one column a sample, always the same prompts and noise."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import interpolate

from rlalign.files import in_words
from rlalign.workers.shown import shown

SHORTEST = 96  # pixels that a picture's shorter side should have, to be seen; see `shown` for the longer one
GAP, MARGIN, TEXT, LINES = 4, 12, 13, 2
GRID = "grid.png"  # what the contact sheet of a folder of pictures is called
INK, PAPER = "#24292f", "#ffffff"


def save_grid(images: Tensor, captions: Sequence[str], path: Path) -> None:
    """uint8 images [P, G, 3, H, W] (of videos [P, G, F, 3, H, W] the middle frame) with a caption for each row."""
    assert len(images) == len(captions), f"{len(captions)} captions for {len(images)} rows"
    rows = [_row(group, caption) for group, caption in zip(images.cpu(), captions, strict=True)]
    _save(_stacked(rows), path)


def before_after(folder: Path) -> Path | None:
    """The first and the last grid of a run's ``samples`` folder side by side, as before_after.png beside them."""
    grids = saved(folder)
    if len(grids) < 2:
        return None
    path = folder / "before_after.png"
    side_by_side(grids[0], grids[-1], path)
    return path


def side_by_side(left: Path, right: Path, path: Path) -> None:
    """Two grids, each under its label."""
    halves = [_labelled(file) for file in (left, right)]
    sheet = Image.new("RGB", (sum(half.width for half in halves), max(half.height for half in halves)), PAPER)
    sheet.paste(halves[0], (0, 0))
    sheet.paste(halves[1], (halves[0].width, 0))
    _save(sheet, path)


def _labelled(file: Path) -> Image.Image:
    with Image.open(file) as grid:
        return _stacked([_text(label(file), grid.width), grid])


def saved(folder: Path) -> list[Path]:
    """The grids of a run, oldest first."""
    return sorted(folder.glob("step_*.png"), key=_step)


def label(path: Path) -> str:
    """What a saved grid shows."""
    return f"after {_step(path):,} updates" if _step(path) else "before training"


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))


def _row(group: Tensor, caption: str) -> Image.Image:
    """[G, (F,) 3, H, W] beside each other, the caption above."""
    cells = [Image.fromarray(picture.movedim(0, -1).numpy()) for picture in _viewable(group)]
    width = sum(cell.width for cell in cells) + GAP * (len(cells) - 1)
    text = _text(caption, width)
    row = Image.new("RGB", (width, text.height + cells[0].height), PAPER)
    row.paste(text, (0, 0))
    for index, cell in enumerate(cells):
        row.paste(cell, (index * (cell.width + GAP), text.height))
    return row


def _viewable(group: Tensor) -> Tensor:
    """Small pictures enlarged by a whole number, so that pixels stay what they are; big ones reduced."""
    small = shown(group)
    return interpolate(small, scale_factor=max(1, -(-SHORTEST // min(small.shape[-2:]))), mode="nearest")


def _text(words: str, width: int) -> Image.Image:
    """At most two lines of text."""
    font = ImageFont.truetype(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), TEXT)
    lines = _wrapped(" ".join(words.split()), width, font)
    height = TEXT + 5
    image = Image.new("RGB", (width, height * len(lines) + GAP), PAPER)
    draw = ImageDraw.Draw(image)
    for index, line in enumerate(lines):
        draw.text((0, index * height), line, INK, font)
    return image


def _wrapped(words: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for word in words.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while font.getlength(f"{last} ...") > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], f"{last} ..."]
    return lines


def _stacked(rows: Sequence[Image.Image]) -> Image.Image:
    width, height = max(row.width for row in rows), sum(row.height for row in rows)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + MARGIN * (len(rows) + 1)), PAPER)
    top = MARGIN
    for row in rows:
        sheet.paste(row, (MARGIN, top))
        top += row.height + MARGIN
    return sheet


def _save(image: Image.Image, path: Path) -> None:
    with in_words(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, optimize=True)
