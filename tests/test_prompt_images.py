"""Images and videos that samples are made from: read from the prompt file, part of what is encoded, seen by rewards."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.prompts import PromptSet, seen_by_model, stand_in
from rlalign.scoring import RewardConfig
from rlalign.scoring.wire import as_json
from rlalign.types import Cond, Prompt, Size, Unit
from rlalign.workers.sampler import Sampler
from rlalign.workers.scorer import Scorer
from tests.contracts.families import FAMILIES
from tests.runs import call, without_pages
from tests.small import policy

SIZE = Size(4, 6)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of one colour, of another size than the run's."""
    for value in (10, 20, 30):
        Image.new("RGB", (12, 8), (value, 0, 255 - value)).save(tmp_path / f"{value}.png")
    return tmp_path


def test_a_step_opens_the_images_of_its_prompts(folder: Path):
    path = write(folder, {"text": "bluer", "image": "10.png"}, {"text": "bluer", "image": "20.png"}, {"text": "new"})
    prompts = PromptSet.read(path, SIZE)
    assert all(prompt.image is None for prompt in prompts.prompts)  # a large set does not fill the memory
    by_title = {prompt.title: prompt for prompt in prompts.at(seed=0, step=0, count=3)}
    for value in (10, 20):
        image = by_title[f"bluer [{folder / f'{value}.png'}]"].image
        assert image is not None and image.shape == (3, 4, 6) and image.dtype == torch.uint8
        assert (image[0] == value).all() and (image[2] == 255 - value).all()
    assert by_title["new"].image is None
    first = prompts.first(1)[0].image
    assert first is not None and (first[0] == 10).all()


def test_a_video_is_its_frames(folder: Path):
    path = write(folder, {"text": "faster", "video": ["10.png", "20.png", "30.png"]})
    (prompt,) = PromptSet.read(path, SIZE).first(1)
    assert prompt.image is None and prompt.video is not None and prompt.video.shape == (3, 3, 4, 6)
    assert prompt.video[:, 0, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": "none.png"}, "line 1: there is no image .*none.png"),
        ({"video": ["10.png", "none.png"]}, "there is no image .*none.png"),
        ({"image": ["10.png"]}, "image must be the path of one file"),
        ({"video": "10.png"}, "video a list of those of its frames"),
        ({"picture": "10.png"}, "unknown key 'picture'; known are text, negative, metadata, image, video"),
    ],
)
def test_what_cannot_be_read_is_named(folder: Path, row: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        PromptSet.read(write(folder, {"text": "a", **row}), SIZE)


def test_a_damaged_image_is_named_when_it_is_opened(folder: Path):
    (folder / "bad.png").write_bytes(b"no picture")
    prompts = PromptSet.read(write(folder, {"text": "a", "image": "bad.png"}), SIZE)
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        prompts.first(1)


def test_the_key_is_the_content():
    prompt = stand_in("a", SIZE)
    assert prompt.image is not None
    same = replace(prompt, image=prompt.image.clone(), metadata={"tag": "x"}, files={"image": "other.png"})
    assert seen_by_model(same) == seen_by_model(prompt)
    others = [
        replace(prompt, text="b"),
        replace(prompt, negative=""),
        replace(prompt, image=None),
        replace(prompt, image=prompt.image + 1),
        replace(prompt, image=prompt.image.reshape(3, 6, 4)),
        replace(prompt, image=None, video=prompt.image),
        replace(prompt, video=prompt.image[None]),
    ]
    assert len({seen_by_model(other) for other in (prompt, *others)}) == 1 + len(others)


class Edits:
    """The analytic family with a condition that is the image's mean."""

    def __init__(self, shared: Policy) -> None:
        self.family, self.encoded = shared.family, list[str]()

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond | None]:
        self.encoded.extend(prompt.text for prompt in prompts)
        cond, uncond = self.family.encode(prompts)
        means = torch.stack([p.image.float().mean().reshape(1) for p in prompts if p.image is not None])
        return cond | {"image": means}, None if uncond is None else uncond | {"image": means}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)


def test_the_sampler_encodes_each_image_once_and_none_for_another():
    shared = policy()
    family: Any = Edits(shared)
    shared.family = family
    sampler = Sampler(shared, Noise(0), "policy", keep_steps=True, shares=True)
    size = Size(1, 2)
    dark, bright = (replace(stand_in("a", size), image=torch.full((3, 1, 2), value).byte()) for value in (1, 9))
    unit = Unit(0, (0, 1, 2), (dark, bright, dark), samples=2)
    trajectory, _ = sampler.sample(unit)
    assert trajectory.cond["image"].flatten().tolist() == [1, 9, 1]
    assert family.encoded == ["a", "a"]
    assert trajectory.prompts == unit.prompts  # for rewards that are differentiated


REWARD = """
import torch

def closeness(images, prompts):
    sources = torch.stack([prompt.image for prompt in prompts])
    return -(images.float() - sources.float()).abs().mean((1, 2, 3))
"""


def test_rewards_see_what_the_picture_is_made_from(folder: Path):
    path = write(folder, {"text": "same", "image": "10.png"}, {"text": "same", "image": "20.png"})
    prompts = PromptSet.read(path, SIZE).first(2)
    (folder / "reward.py").write_text(REWARD)
    scorer = Scorer([RewardConfig(use=f"{folder / 'reward.py'}:closeness", name="closeness")])
    (first, *_) = [prompt.image for prompt in prompts if prompt.image is not None]
    scores = scorer.score(first.expand(4, -1, -1, -1), Unit(0, (0, 1), prompts, samples=2))
    assert torch.allclose(scores.total, torch.tensor([[0.0, 0.0], [-20 / 3, -20 / 3]]))
    assert len(set(scores.prompts)) == 2  # a running mean of a prompt is not shared with another image's


def test_a_reward_server_gets_them_as_png(folder: Path):
    path = write(folder, {"text": "a", "image": "10.png"}, {"text": "b", "video": ["10.png", "20.png"]}, {"text": "c"})
    prompts = PromptSet.read(path, SIZE).first(3)
    asked = json.loads(as_json(torch.zeros(3, 3, 4, 6, dtype=torch.uint8), prompts))["prompts"]
    assert [row.keys() - {"text", "negative", "metadata"} for row in asked] == [{"image"}, {"video"}, set()]
    assert len(asked[1]["video"]) == 2
    sent = np.array(Image.open(io.BytesIO(base64.b64decode(asked[0]["image"]))))
    assert prompts[0].image is not None and np.array_equal(sent, prompts[0].image.permute(1, 2, 0).numpy())


@pytest.fixture
def editing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file of a model that starts from images."""
    torch.set_num_threads(1)
    without_pages(monkeypatch)
    monkeypatch.chdir(folder)
    case = FAMILIES["flux_kontext"]
    run: dict[str, Any] = {
        "model": {"family": case.module, "path": str(case.write(folder / "model")), "lora": {"rank": 1}, **case.config},
        "prompts": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
        "rollout": {"prompts_per_step": 1, "samples_per_prompt": 2, "num_steps": 3, "size": list(case.size[:2])},
        "rewards": ["saturation"],
        "evaluation": {"every": 0, "num_images": 2, "samples_per_prompt": 2, "num_steps": 1},
        "steps": 1,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    write(folder, {"text": "bluer", "image": "10.png"})
    return folder


def test_an_image_that_is_missing_is_said_in_a_sentence(editing: Path, capsys: pytest.CaptureFixture[str]):
    (editing / "heldout.jsonl").write_text(json.dumps({"text": "redder"}))
    done = call(capsys, "train", "run.yaml")
    assert done.code == 2 and "the prompt 'redder' has no image, which this model starts from" in done.err
    assert "Traceback" not in done.err


def test_a_picture_is_made_from_an_image_on_the_command_line(editing: Path, capsys: pytest.CaptureFixture[str]):
    (editing / "heldout.jsonl").write_text(json.dumps({"text": "redder", "image": "20.png"}))
    asked = ("sample", "run.yaml", "--prompt", "bluer", "--num", "1")
    for image in ("10.png", "30.png"):
        assert call(capsys, *asked, "--image", image, "--to", image.removesuffix(".png")).code == 0
    one, other = (np.array(Image.open(editing / name / "000_00.png")) for name in ("10", "30"))
    assert (one != other).any()
    assert "has no image" in call(capsys, *asked, "--to", "none").err
    assert "--prompt" in call(capsys, "sample", "run.yaml", "--image", "10.png").err
    assert call(capsys, "sample", "run.yaml", "--num", "1", "--to", "heldout").code == 0


def test_what_is_recorded_starts_from_the_same_image(editing: Path, capsys: pytest.CaptureFixture[str]):
    (editing / "heldout.jsonl").write_text(json.dumps({"text": "redder", "image": "20.png"}))
    done = call(capsys, "record", "run.yaml", "--prompts", "1", "--num", "2", "--to", "new")
    assert done.code == 0, done.err
    (prompt,) = PromptSet.read(editing / "new" / "train.jsonl", SIZE).recorded(2).first(1)
    assert prompt.text == "bluer" and len(prompt.metadata["images"]) == 2
    assert prompt.image is not None and (prompt.image[0] == 10).all()
