"""Picture grids can be seen: small pictures are enlarged pixel by pixel, big ones reduced, captions stand above."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from rlalign.reporting.grids import GAP, MARGIN, before_after, save_grid, saved
from rlalign.workers.shown import shown


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.copy()


def test_small_pictures_are_enlarged_without_blur(tmp_path: Path) -> None:
    images = torch.randint(0, 255, (2, 3, 3, 32, 32), dtype=torch.uint8)
    save_grid(images, ["one", "two"], tmp_path / "grid.png")
    grid = opened(tmp_path / "grid.png")
    assert grid.width == 3 * 96 + 2 * GAP + 2 * MARGIN
    bottom, right = grid.height - MARGIN, grid.width - MARGIN
    corner = grid.crop((right - 96, bottom - 96, right, bottom)).resize((32, 32), Image.Resampling.NEAREST)
    assert torch.equal(torch.tensor(list(corner.tobytes())).reshape(32, 32, 3), images[1, 2].movedim(0, -1).long())


@pytest.mark.parametrize(("shape", "cell"), [((512, 1024), 256), ((100, 200), 200), ((8, 8), 96)])
def test_cells_have_a_size_to_look_at(tmp_path: Path, shape: tuple[int, int], cell: int) -> None:
    save_grid(torch.zeros(1, 1, 3, *shape, dtype=torch.uint8), ["x"], tmp_path / "grid.png")
    assert opened(tmp_path / "grid.png").width == cell + 2 * MARGIN


def test_captions_take_at_most_two_lines_and_any_script(tmp_path: Path) -> None:
    heights = []
    for caption in ("", "short", "a very long prompt that goes on " * 20, "w" * 500, "größer Ελληνικά 文字\nnew line"):
        save_grid(torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8), [caption], tmp_path / "grid.png")
        heights.append(opened(tmp_path / "grid.png").height)
    assert heights[0] == heights[1] and heights[2] - heights[1] < 25 and heights[3] <= heights[2]


def test_of_a_video_the_middle_frame_is_shown(tmp_path: Path) -> None:
    video = torch.zeros(1, 1, 5, 3, 96, 96, dtype=torch.uint8)
    video[:, :, 2] = 200
    save_grid(video, ["moves"], tmp_path / "grid.png")
    grid = opened(tmp_path / "grid.png")
    assert grid.getpixel((grid.width // 2, grid.height - MARGIN - 10)) == (200, 200, 200)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 200, 300), (2, 5, 3, 512, 384), (2, 3, 1, 2000)])
def test_pictures_that_were_made_small_on_their_way_make_the_same_grid(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sent = shown(images)
    assert sent.ndim == 4 and max(sent.shape[-2:]) <= 256 and (max(shape[-2:]) > 256 or torch.equal(sent, images))
    for name, pictures in (("whole", images), ("small", sent)):
        save_grid(pictures[None], ["x"], tmp_path / f"{name}.png")
    assert opened(tmp_path / "whole.png").tobytes() == opened(tmp_path / "small.png").tobytes()


def test_before_and_after_side_by_side(tmp_path: Path) -> None:
    assert before_after(tmp_path) is None
    for step in (0, 999_999, 1_000_000):
        pictures = torch.full((1, 1, 3, 32, 32), step % 7 * 40, dtype=torch.uint8)
        save_grid(pictures, ["x"], tmp_path / f"step_{step:06d}.png")
    path = before_after(tmp_path)
    assert path is not None and path == tmp_path / "before_after.png"
    assert [one.stem for one in saved(tmp_path)] == ["step_000000", "step_999999", "step_1000000"]
    assert opened(path).width >= 2 * opened(saved(tmp_path)[0]).width
