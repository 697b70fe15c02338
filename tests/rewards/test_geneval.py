"""GenEval's rules on made-up detections, its colours on painted ones, and real detectors with tiny weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from rlalign.types import Prompt
from rlalign_rewards import geneval as module
from rlalign_rewards.geneval import Detector, Found, Geneval, checked, cut_out, grouped, relations
from tests.rewards.tiny import geneval_folder, pictures, shaken


def thing(label: str, x: float = 16, y: float = 16, score: float = 0.95, size: float = 8) -> Found:
    return Found(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def judged(found: list[Found], metadata: dict[str, Any], colors: dict[float, str] | None = None) -> list[bool]:
    """The colour of a thing is given by its x."""
    objects = grouped(found, metadata.get("tag") == "counting")
    return checked(objects, metadata, lambda things, _: [(colors or {})[one.center[0]] for one in things])


TWO_CATS = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "exclude": [{"class": "cat", "count": 3}]}
BESIDE = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
}
PAINTED = {
    "tag": "color_attr",
    "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
}


@pytest.mark.parametrize(
    ("cats", "holds"),
    [
        ([0.95, 0.95], [True, True]),
        ([0.95], [False, True]),
        ([0.95] * 3, [True, False]),
        ([0.95, 0.95, 0.8], [True, True]),
    ],
)
def test_counting_takes_sure_objects_alone(cats: list[float], holds: list[bool]) -> None:
    assert judged([thing("cat", score=score) for score in cats], TWO_CATS) == holds


@pytest.mark.parametrize(
    ("cat", "holds"),
    [((4, 16), True), ((28, 16), False), ((16, 4), False), ((15, 16), False), ((8, 10), True)],
)
def test_positions_are_those_of_the_surest(cat: tuple[float, float], holds: bool) -> None:
    found = [thing("dog"), thing("cat", *cat), thing("cat", 1, 16, score=0.5)]
    assert judged(found, BESIDE) == [True, holds]


def test_a_relation_to_what_is_missing_does_not_hold() -> None:
    assert judged([thing("cat")], BESIDE) == [False, False]


def test_colours_belong_to_their_objects() -> None:
    found = [thing("cat", 4), thing("dog", 28)]
    assert judged(found, PAINTED, {4: "red", 28: "blue"}) == [True, True]
    assert judged(found, PAINTED, {4: "blue", 28: "red"}) == [False, False]


def test_long_names_are_the_detectors() -> None:
    include = {"include": [{"class": "computer keyboard", "count": 1}]}
    assert judged([thing("keyboard")], include) == [True]


def test_relations_are_the_published_formula() -> None:
    assert relations(thing("a", 4, 4), thing("b", 28, 28)) == {"left of", "above"}
    assert relations(thing("a", 4, 16), thing("b", 28, 16)) == {"left of"}
    assert relations(thing("a", 17, 16), thing("b", 16, 16)) == set()
    # offset (3, 0), both 10 wide: 3 - 0.1 * 20 = 1 is left of it, and 1 / 3 < 0.5
    assert relations(thing("a", 19, 16, size=10), thing("b", 16, 16, size=10)) == set()
    assert relations(thing("a", 21, 16, size=10), thing("b", 16, 16, size=10)) == {"right of"}


def test_what_is_cut_out_stands_on_grey() -> None:
    image = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:4, 3:6] = True
    cut = cut_out(image, Found("cat", 1.0, (2.0, 2.0, 6.0, 4.0), mask))
    assert cut.shape == (3, 2, 4)
    assert cut[0].tolist() == [[pytest.approx(0.6), 1, 1, 1]] * 2
    assert module.around(mask) == (3, 2, 6, 4)
    assert cut_out(image, thing("cat", 8, 8, size=0)).shape == (3, 1, 1)


PAINT = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}


class FakeClip:
    """Sees the mean colour and reads the names of colours."""

    def images(self, images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def texts(self, texts: list[str]) -> Tensor:
        words = [text.replace("-", " ").split()[4] for text in texts]
        paint = torch.tensor([PAINT.get(word, (-1, -1, -1)) for word in words]).float()
        return torch.nn.functional.normalize(paint, dim=-1)


def test_every_object_gets_its_own_colour() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[0, :, :16] = image[2, :, 16:] = 250
    clip: Any = FakeClip()
    colors = module.Colors(clip)
    assert colors(image, [thing("cat", 6), thing("cat", 25)], "cat") == ["red", "blue"]


def test_the_score_and_its_details(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = geneval_folder(tmp_path)
    circles = {
        "tag": "counting",
        "include": [{"class": "circle", "count": 2}],
        "exclude": [{"class": "dog", "count": 1}],
    }
    prompts = [Prompt("two circles", metadata=circles)] * 3
    found = [[thing("circle"), thing("circle", 4)], [thing("circle")], [thing("dog")]]
    monkeypatch.setattr(Detector, "find", lambda self, images: found)
    answer = Geneval(**options)(pictures(3), prompts)
    assert answer["score"].tolist() == [1, 0, 0] and answer["share"].tolist() == [1, 0.5, 0]
    assert answer["task/counting"].tolist() == [1, 0, 0] and answer["task/colors"].isnan().all()
    assert Geneval(**options, reward="share")(pictures(3), prompts)["score"].tolist() == [1, 0.5, 0]


def test_boxes_come_in_pixels_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SURE", 0.0)
    for picture in Detector(geneval_folder(tmp_path)["detector"], None, "float32").find(pictures(2, 40, 80)):
        assert len(picture) == 5 and {one.label for one in picture} <= {"circle", "dog"}
        assert [one.score for one in picture] == sorted((one.score for one in picture), reverse=True)
        assert max(one.box[2] for one in picture) > 40


def test_instance_segmentation_gives_masks_and_their_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SURE", 0.0)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2, patch_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=6,
        id2label={0: "circle", 1: "dog"}, label2id={"circle": 0, "dog": 1},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shaken(Mask2FormerForUniversalSegmentation(config)).save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = [one for row in Detector(str(tmp_path), None, "float32").find(pictures(2, 40, 48)) for one in row]
    assert found
    for one in found:
        assert one.mask is not None and one.mask.shape == (40, 48) and one.box == module.around(one.mask)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({}, "needs metadata with 'include'"),
        ({"include": [{"class": "unicorn", "count": 1}]}, "the detector knows no 'unicorn', which 'a prompt' asks for"),
        ({"include": [{"class": "dog", "count": 1, "color": "mauve"}]}, "asks for the colour 'mauve'; known: red"),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused(metadata: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    reward = Geneval(**geneval_folder(tmp_path))
    with pytest.raises(ValueError, match=complaint):
        reward(pictures(1), [Prompt("a prompt", metadata=metadata)])


def test_without_weights_it_says_so() -> None:
    with pytest.raises(ValueError, match="hf download facebook/mask2former-swin-small-coco-instance"):
        Geneval()
    wrong: dict[str, Any] = {"reward": "loose"}
    with pytest.raises(ValueError, match="reward 'loose' is none of strict, share"):
        Geneval(**wrong)
