"""Every asked property counts, nothing else may be in the picture, and noise shows nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlalign.types import Prompt
from rlalign.zoo.scenes import caption, compositions, draw
from rlalign_rewards.composition import PALETTE, TASKS, composition, partial, read_scenes

Metadata = dict[str, Any]


def one(shape: str, color: str | None = None, count: int = 1, **more: Any) -> Metadata:
    return {"class": shape, "count": count, **({"color": color} if color else {}), **more}


def scene(tag: str, *include: Metadata) -> Metadata:
    return {"tag": tag, "include": list(include)}


def pictures(scenes: list[Metadata], seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([draw(metadata, rng) for metadata in scenes])).permute(0, 3, 1, 2)


def prompts(scenes: list[Metadata]) -> list[Prompt]:
    return [Prompt(caption(metadata), metadata=metadata) for metadata in scenes]


def random_scenes(task: str, count: int) -> list[Metadata]:
    wordings = list(compositions(task))
    return [wordings[index] for index in np.random.default_rng(1).integers(len(wordings), size=count)]


@pytest.mark.parametrize("task", TASKS)
def test_reads_freshly_drawn_scenes(task: str) -> None:
    scenes = random_scenes(task, 250)
    assert composition(pictures(scenes), prompts(scenes))["score"].mean() >= 0.98


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_blank_picture_shows_nothing(level: int) -> None:
    scenes = [metadata for task in TASKS for metadata in random_scenes(task, 10)]
    blank = torch.full((len(scenes), 3, 32, 32), level, dtype=torch.uint8)
    assert composition(blank, prompts(scenes))["score"].sum() == 0
    assert partial(blank, prompts(scenes))["score"].sum() == 0


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16])
def test_noise_of_any_grain_shows_nothing(block: int) -> None:
    scenes = [metadata for task in TASKS for metadata in random_scenes(task, 50)]
    shape = (len(scenes), 3, 32 // block, 32 // block)
    coarse = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    noise = coarse.to(torch.uint8).repeat_interleave(block, -1).repeat_interleave(block, -2)
    assert composition(noise, prompts(scenes))["score"].sum() == 0


RED_ABOVE_BLUE = scene("position", one("square", "blue"), one("circle", "red", position=["above", 0]))


@pytest.mark.parametrize(
    ("drawn", "asked"),
    [
        (scene("single_object", one("circle")), scene("single_object", one("square"))),
        (scene("colors", one("circle", "red")), scene("colors", one("circle", "purple"))),
        (scene("counting", one("cross", "cyan", 3)), scene("counting", one("cross", "cyan", 2))),
        (scene("counting", one("cross", "cyan", 3)), scene("counting", one("cross", "cyan", 4))),
        (scene("two_object", one("circle"), one("cross")), scene("two_object", one("circle"), one("triangle"))),
        (scene("two_object", one("circle"), one("cross")), scene("single_object", one("circle"))),
        (
            scene("color_attr", one("circle", "red"), one("square", "blue")),
            scene("color_attr", one("circle", "blue"), one("square", "red")),
        ),
        (
            RED_ABOVE_BLUE,
            scene("position", one("square", "blue"), one("circle", "red", position=["below", 0])),
        ),
        (
            RED_ABOVE_BLUE,
            scene("position", one("square", "blue"), one("circle", "red", position=["left of", 0])),
        ),
    ],
    ids=["shape", "color", "too_many", "too_few", "other_object", "extra_object", "binding", "opposite", "other_axis"],
)
def test_another_composition_scores_zero(drawn: Metadata, asked: Metadata) -> None:
    images = pictures([drawn] * 20)
    assert composition(images, prompts([drawn] * 20))["score"].mean() >= 0.95
    assert composition(images, prompts([asked] * 20))["score"].sum() == 0
    assert (partial(images, prompts([asked] * 20))["score"] < 1).all()


def test_two_wordings_of_one_scene_agree() -> None:
    other = scene("position", one("circle", "red"), one("square", "blue", position=["below", 0]))
    images = pictures([RED_ABOVE_BLUE] * 20)
    first, second = (composition(images, prompts([wording] * 20))["score"] for wording in (RED_ABOVE_BLUE, other))
    assert first.equal(second)


def test_reports_accuracy_per_task() -> None:
    scenes = [scene("colors", one("circle", "red")), scene("counting", one("cross", "cyan", 3))]
    scores = composition(pictures(scenes), prompts([scenes[0], scene("counting", one("cross", "red", 3))]))
    assert scores["score"].tolist() == [1, 0]
    assert scores["task/colors"].nanmean() == 1
    assert scores["task/counting"].nanmean() == 0
    assert scores["task/position"].isnan().all()


def test_partial_credit_rises_with_every_property_found() -> None:
    drawn = scene("color_attr", one("circle", "red"), one("square", "blue"))
    asked = [
        scene("colors", one("cross", "green")),
        scene("color_attr", one("cross", "red"), one("triangle", "green")),
        scene("color_attr", one("circle", "red"), one("triangle", "green")),
        scene("color_attr", one("circle", "red"), one("square", "green")),
        drawn,
    ]
    scores = partial(pictures([drawn] * 5), prompts(asked))
    assert scores["score"].tolist() == pytest.approx([0, 1 / 4, 2 / 4, 3 / 4, 1])
    assert scores["strict"].tolist() == [0, 0, 0, 0, 1]


def test_a_picture_is_read_alike_alone_and_among_others() -> None:
    scenes = [metadata for task in TASKS for metadata in random_scenes(task, 10)]
    images = pictures(scenes)
    assert read_scenes(images) == [scene for image in images for scene in read_scenes(image[None])]


def test_things_have_places_and_sizes() -> None:
    image = torch.full((1, 3, 32, 32), 250, dtype=torch.uint8)
    image[0, :, 4:14, 18:28] = torch.tensor(PALETTE["green"], dtype=torch.uint8)[:, None, None]
    [[thing]] = read_scenes(image)
    assert (thing.shape, thing.color, thing.x, thing.y, thing.area) == ("square", "green", 23, 9, 100)


def test_prompts_without_metadata_are_refused() -> None:
    with pytest.raises(ValueError, match="'a red circle' has none"):
        composition(pictures([RED_ABOVE_BLUE]), [Prompt("a red circle")])
