"""Films scored frame by frame, through the reward layer and alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlalign.scoring import RewardConfig, Scoring, load_reward
from rlalign.types import Prompt, Unit
from rlalign_rewards.statistics import saturation
from rlalign_rewards.video_frames import VideoFrames

REWARDS = '''
from rlalign.scoring import groupwise

def level(images, prompts, factor=1.0):
    """The first pixel, NaN at 255; the detail does not apply to black."""
    first = images[:, 0, 0, 0].float()
    return {
        "score": (factor * first).masked_fill(first == 255, float("nan")),
        "detail": first.masked_fill(first == 0, float("nan")),
    }

async def later(images, prompts):
    return images[:, 0, 0, 0].float()

def named(images, prompts):
    return [float(len(prompt.text)) for prompt in prompts]

@groupwise
def compares(images, prompts):
    return [0.0] * len(images)
'''
PROMPTS = [Prompt("a"), Prompt("bbb")]


def film(*levels: int) -> Tensor:
    """[F, 3, 2, 2] uint8, each frame of one grey."""
    return torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


FILMS = torch.stack([film(10, 20, 60, 30), film(0, 4, 8, 0)])


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(REWARDS)
    return str(tmp_path / "mine.py")


def scores(reward: VideoFrames, films: Tensor = FILMS) -> list[float]:
    answer = reward(films, PROMPTS)
    assert isinstance(answer, dict)
    return answer["score"].tolist()


def test_the_mean_and_the_least_of_the_frames(file: str):
    assert scores(VideoFrames(f"{file}:level")) == [30.0, 3.0]
    assert scores(VideoFrames(f"{file}:level", "min")) == [10.0, 0.0]


def test_every_other_frame_from_the_first(file: str):
    assert scores(VideoFrames(f"{file}:level", every=2)) == [35.0, 4.0]
    assert scores(VideoFrames(f"{file}:level", every=9)) == [10.0, 0.0]


def test_options_are_the_reward_s(file: str):
    assert scores(VideoFrames(f"{file}:level", options={"factor": 0.5})) == [15.0, 1.5]


def test_each_frame_has_the_prompt_of_its_film(file: str):
    assert scores(VideoFrames(f"{file}:named")) == [1.0, 3.0]


def test_a_picture_is_a_film_of_one_frame(file: str):
    assert scores(VideoFrames(f"{file}:level"), FILMS[:, 0]) == [10.0, 0.0]


def test_a_detail_is_the_mean_where_it_applies(file: str):
    answer = VideoFrames(f"{file}:level")(FILMS, PROMPTS)
    assert isinstance(answer, dict) and answer["detail"].tolist() == [30.0, 6.0]


@pytest.mark.parametrize("reduce", ["mean", "min"])
def test_a_frame_that_cannot_be_judged_leaves_the_film_unjudged(file: str, reduce: str):
    reward = VideoFrames(f"{file}:level", reduce)  # pyright: ignore[reportArgumentType]
    first, second = scores(reward, torch.stack([film(10, 255), film(1, 1)]))
    assert first != first and second == 1.0


def test_a_differentiable_reward_gets_what_it_expects():
    films = torch.randint(0, 256, (2, 4, 3, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = saturation(films / 255, PROMPTS)
    assert scores(VideoFrames("rlalign_rewards.statistics:saturation"), films) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("name", ["level", "later"])
def test_through_the_reward_layer(file: str, name: str):
    options = {"of": f"{file}:{name}"}
    config = RewardConfig(use="rlalign_rewards.video_frames:VideoFrames", options=options, retries=0)
    unit = Unit(0, (0, 1), tuple(PROMPTS), samples=2)
    found = Scoring([load_reward(config)]).score(FILMS.repeat_interleave(2, 0), unit)
    assert found.valid.all() and found.total.tolist() == [[30.0, 30.0], [3.0, 3.0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reduce": "median"}, "it can be mean or min"),
        ({"every": 0}, "must be 1 or more"),
        ({"of": "nothing"}, "the catalogue has no 'nothing'"),
        ({"of": "FILE:compares"}, "compares the pictures of a prompt"),
    ],
)
def test_what_cannot_be_is_refused(file: str, options: dict[str, str], words: str):
    given = {key: value.replace("FILE", file) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises(ValueError, match=words):
        load_reward(RewardConfig(use="rlalign_rewards.video_frames:VideoFrames", options=given))
