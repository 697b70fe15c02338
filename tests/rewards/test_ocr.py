"""Text that Pillow renders is read back; the formula is checked by hand."""

import builtins
import importlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rlalign.types import Prompt

pytest.importorskip("rapidocr", reason="the extra rlalign[ocr] is not installed")

from rlalign_rewards import ocr as module
from rlalign_rewards.ocr import asked_text, edit_distance, ocr, read, similarity


def written(text: str, size: tuple[int, int] = (32, 32), points: int = 14) -> Tensor:
    """Black on white, in the middle. uint8 [3, H, W]"""
    picture = Image.new("RGB", size, "white")
    middle = (size[0] / 2, size[1] / 2)
    ImageDraw.Draw(picture).text(middle, text, font=ImageFont.load_default(points), fill=(20, 20, 20), anchor="mm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def asks(text: str) -> Prompt:
    return Prompt(f'the text "{text}"', metadata={"text": text})


def scene(*lines: str, points: int = 24) -> Tensor:
    """A coloured scene of 512 x 512 with a sign in a corner. uint8 [3, 512, 512]"""
    ramp = np.linspace(60, 200, 512)
    colours = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 255 - ramp[:, None]), -1).astype(np.uint8)
    picture = Image.fromarray(colours)
    draw = ImageDraw.Draw(picture)
    draw.ellipse((40, 60, 220, 240), fill=(200, 60, 40))
    draw.rectangle((300, 400, 490, 490), fill=(240, 235, 220))
    for number, line in enumerate(lines):
        draw.text((315, 408 + 40 * number), line, font=ImageFont.load_default(points), fill=(30, 30, 30))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


WORDS = ["42", "995", "5", "CAT", "SUN", "KEY", "108", "MAP", "FOX", "361"]


def test_rendered_words_are_read() -> None:
    images = torch.stack([written(word) for word in WORDS])
    scores = ocr(images, [asks(word) for word in WORDS])
    assert scores["score"].tolist() == [1.0] * len(WORDS)


def test_a_wide_picture_and_a_large_one() -> None:
    assert read(written("hello world", size=(96, 24))[None])[0].replace(" ", "").lower() == "helloworld"
    assert read(written("995", size=(256, 256), points=110)[None]) == ["995"]


def test_the_wrong_text_earns_what_agrees() -> None:
    images = written("995").expand(4, 3, 32, 32)
    scores = ocr(images, [asks("995"), asks("985"), asks("123"), asks("CAT")])
    torch.testing.assert_close(scores["score"], torch.tensor([1.0, 2 / 3, 0.0, 0.0]))
    assert scores["exact"].tolist() == [1, 0, 0, 0]


def test_blank_and_noise_read_as_nothing() -> None:
    noise = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    blank = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    scores = ocr(torch.cat([noise, blank]), [asks("CAT")] * 6)
    assert scores["score"].max() == 0


def test_readings_do_not_depend_on_the_batch() -> None:
    images = torch.stack([written(word) for word in WORDS])
    alone = [read(image[None])[0] for image in images]
    assert read(images) == alone
    assert read(images.flip(0)) == alone[::-1]


SIGNS = [("OPEN", "24 HOURS"), ("Summer Sale",), ("hello",), ()]


def test_text_in_a_corner_of_a_scene_is_found() -> None:
    images, asked = torch.stack([scene(*lines) for lines in SIGNS[:3]]), [" ".join(lines) for lines in SIGNS[:3]]
    prompts = [asks(text) for text in asked]
    assert ocr(images, prompts, detect=True)["score"].tolist() == [1.0] * 3
    assert ocr(images, prompts)["score"].max() < 0.3
    wrong = ocr(images, [asks("CLOSED 12-6"), asks("Winter Fair"), asks("jelly")], detect=True)["score"]
    assert wrong.max() < 0.7 and ocr(scene()[None], [asks("hello")], detect=True)["score"].item() < 0.3


def test_what_is_found_does_not_depend_on_the_batch() -> None:
    images = torch.stack([scene(*lines) for lines in SIGNS])
    assert read(images, detect=True) == [read(image[None], detect=True)[0] for image in images]


@pytest.mark.parametrize(
    ("text", "score", "exact"), [("OPEN", 1, 0), ("OPEN 24 HOURS", 1, 1), ("OPEN 25 HOUR", 0.8, 0)]
)
def test_with_detection_more_than_the_asked_text_costs_nothing(
    text: str, score: float, exact: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Flow-GRPO."""
    monkeypatch.setattr(module, "read", lambda images, detect: ["OPEN 24 HOURS"])
    found = ocr(written("")[None], [asks(text)], detect=True)
    assert found["score"].item() == pytest.approx(score) and found["exact"].item() == exact


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("42", "24", 2), ("flaw", "lawn", 2)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance


@pytest.mark.parametrize(
    ("text", "asked", "score"),
    [
        ("hello", "hello", 1),
        ("hallo", "hello", 0.8),
        ("", "hello", 0),
        ("x" * 50, "hello", 0),
        ("hellohello", "hello", 0),
    ],
)
def test_similarity(text: str, asked: str, score: float) -> None:
    assert similarity(text, asked) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "metadata", "asked"),
    [
        ("a sign", {"text": "OPEN"}, "OPEN"),
        ('a sign with "OPEN" and "SHUT"', {}, "OPEN"),
        ('a sign with "OPEN"', {"text": "SHUT"}, "SHUT"),
        ('a sign with "OPEN"', {"text": ""}, "OPEN"),
    ],
)
def test_the_asked_text(text: str, metadata: Mapping[str, Any], asked: str) -> None:
    assert asked_text(Prompt(text, metadata=metadata)) == asked


@pytest.mark.parametrize(
    ("text", "metadata"),
    [("a sign", {}), ('a " sign', {}), ('a "" sign', {}), ("a sign", {"text": " "}), ("a", {"text": 42})],
)
def test_a_prompt_that_asks_for_no_text_is_refused(text: str, metadata: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs metadata 'text' or text in double quotes"):
        asked_text(Prompt(text, metadata=metadata))


def test_case_and_spaces_do_not_count() -> None:
    assert ocr(written("995")[None], [asks(" 9 9\t5 ")])["score"].item() == 1


def test_videos_are_refused() -> None:
    with pytest.raises(ValueError, match="not videos"):
        ocr(torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8), [asks("CAT")])


def test_the_recogniser_is_made_once_from_the_wheels_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("rapidocr tried to download")

    monkeypatch.setattr("socket.socket.connect", no_network)
    module._recogniser.cache_clear()
    assert read(written("995")[None]) == ["995"] == read(written("995", (64, 64), 30)[None], detect=True)
    assert module._recogniser() is module._recogniser()


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = builtins.__import__

    def without_rapidocr(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "rapidocr":
            raise ModuleNotFoundError("No module named 'rapidocr'", name="rapidocr")
        return find(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "rlalign_rewards.ocr")
    monkeypatch.setattr(builtins, "__import__", without_rapidocr)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rlalign\[ocr\]"'):
        importlib.import_module("rlalign_rewards.ocr")
