"""How a reward is named in a run file, and what is said when it cannot be found."""

import importlib.metadata
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.scoring import Reward, RewardConfig, load_reward, load_rewards, loading, reward_names
from rlalign.types import Prompt

IMAGES = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
PROMPTS = [Prompt("a"), Prompt("b")]

MINE = """
from rlalign.scoring import differentiable, groupwise

def ones(images, prompts):
    return [1.0] * len(images)

def scaled(images, prompts, scale=1.0):
    return [scale] * len(images)

def only_images(images):
    return [1.0] * len(images)

async def later(images, prompts):
    return [1.0] * len(images)

class Constant:
    made = 0

    def __init__(self, value=0.5):
        Constant.made += 1
        if value < 0:
            raise RuntimeError("no\\nvalue below zero")
        self.value = value

    def __call__(self, images, prompts):
        return [self.value] * len(images)

class NotCallable:
    pass

@groupwise
def ranks(images, prompts):
    return list(range(len(images)))

@groupwise
@differentiable
class Both:
    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))

ready = Constant(0.25)
number = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def load(folder: Path, use: str, **settings: Any) -> Reward:
    return load_reward(RewardConfig(use=use, **settings), folder)


def answer(reward: Reward) -> object:
    return reward.function(IMAGES, PROMPTS)


def complaint(folder: Path, use: str, **settings: Any) -> str:
    with pytest.raises(ValueError) as caught:
        load(folder, use, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"reward {RewardConfig(use=use).name!r}: ")
    return message


def test_a_function_in_a_file_beside_the_run_file(folder: Path) -> None:
    reward = load(folder, "mine.py:ones")
    assert answer(reward) == [1.0, 1.0]
    assert not reward.groupwise and not reward.differentiable


def test_an_absolute_path_ignores_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert answer(load(elsewhere, f"{folder / 'mine.py'}:ones")) == [1.0, 1.0]


def test_a_function_in_a_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rewards_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(folder)
    assert answer(load(folder, "rewards_of_mine:ones")) == [1.0, 1.0]


def test_options_of_a_function_are_keyword_arguments(folder: Path) -> None:
    assert answer(load(folder, "mine.py:scaled", options={"scale": 2.5})) == [2.5, 2.5]


def test_a_class_is_constructed_once_with_its_options(folder: Path) -> None:
    reward = load(folder, "mine.py:Constant", options={"value": 0.75})
    assert answer(reward) == answer(reward) == [0.75, 0.75]
    assert type(reward.function).made == 2  # `ready` is the other  # pyright: ignore[reportAttributeAccessIssue]


def test_an_object_that_can_be_called(folder: Path) -> None:
    assert answer(load(folder, "mine.py:ready")) == [0.25, 0.25]


def test_markers_are_seen(folder: Path) -> None:
    ranks, both = load(folder, "mine.py:ranks"), load(folder, "mine.py:Both")
    assert (ranks.groupwise, ranks.differentiable) == (True, False)
    assert (both.groupwise, both.differentiable) == (True, True)


def test_a_list_of_rewards_is_checked_as_a_whole(folder: Path) -> None:
    ones, scaled = RewardConfig(use="mine.py:ones"), RewardConfig(use="mine.py:scaled", role="monitor")
    assert [reward.config for reward in load_rewards([ones, scaled], folder)] == [ones, scaled]
    with pytest.raises(ValueError, match="two rewards are called 'ones'"):
        load_rewards([ones, ones], folder)


@pytest.mark.parametrize(
    ("use", "settings", "said"),
    [
        ("nowhere.py:ones", {}, "there is no file"),
        ("mine.py:onse", {}, "mine.py has no 'onse'; did you mean 'ones'?"),
        ("mine.py:number", {}, "it is 3; a reward is a function or a class with __call__"),
        ("mine.py:NotCallable", {}, "a reward is a function or a class with __call__"),
        ("mine.py:only_images", {}, "it cannot be called with (images, prompts): too many positional arguments"),
        (
            "mine.py:scaled",
            {"options": {"scael": 2}},
            "it cannot be called with (images, prompts, scael): got an unexp",
        ),
        (
            "mine.py:Constant",
            {"options": {"valeu": 2}},
            "Constant cannot be constructed with the options valeu: TypeErr",
        ),
        ("mine.py:Constant", {"options": {"value": -1}}, "RuntimeError: value below zero"),
        ("mine.py:ranks", {"batch_size": 4}, "it is groupwise and gets one group in a call; leave batch_size out"),
        ("no_such_module:ones", {}, "ModuleNotFoundError: No module named 'no_such_module'; for a file write"),
        ("torch:onse", {}, "torch has no 'onse'; did you mean 'ones'?"),
        (":ones", {}, "module '' cannot be imported"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_a_sentence(
    folder: Path, use: str, settings: dict[str, Any], said: str
) -> None:
    assert said in complaint(folder, use, **settings)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise ValueError('not\\ntoday')", "ValueError: today"),
        ("raise SystemExit(2)", "SystemExit: 2"),
    ],
)
def test_a_file_that_cannot_be_imported(folder: Path, source: str, said: str) -> None:
    (folder / "bad.py").write_text(source)
    message = complaint(folder, "bad.py:ones")
    assert said in message and f"{folder / 'bad.py'} cannot be imported" in message


# --- the catalogue ---------------------------------------------------------------------------------------------------


def offer(monkeypatch: pytest.MonkeyPatch, **entries: str) -> None:
    group = EntryPoints(EntryPoint(name, value, loading.CATALOGUE) for name, value in entries.items())
    monkeypatch.setattr(loading, "entry_points", lambda **wanted: group.select(**wanted))


def test_a_short_name_is_an_entry_point(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rewards_on_offer.py").write_text(MINE)
    monkeypatch.syspath_prepend(folder)
    offer(monkeypatch, constant="rewards_on_offer:Constant", ones="rewards_on_offer:ones")
    assert reward_names() == ["constant", "ones"]
    assert answer(load(folder, "constant", options={"value": 2})) == [2, 2]
    assert "the catalogue has no 'onez'; did you mean 'ones'?" in complaint(folder, "onez")


def test_a_missing_extra_is_told_when_the_reward_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rewards_with_extra.py").write_text("raise ModuleNotFoundError('pip install \"rlalign[extra]\"')")
    monkeypatch.syspath_prepend(folder)
    offer(monkeypatch, extra="rewards_with_extra:extra")
    assert 'pip install "rlalign[extra]"' in complaint(folder, "extra")


def test_without_installed_packages_there_is_no_catalogue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    message = complaint(folder, "ocr")
    assert "is rlalign itself installed?" in message and "path/to/file.py:function" in message


def test_two_packages_with_one_name_must_be_told_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [EntryPoint("ocr", value, loading.CATALOGUE) for value in ("a:ocr", "b:ocr", "b:ocr")]
    monkeypatch.setattr(loading, "entry_points", lambda **wanted: EntryPoints(entries).select(**wanted))
    assert "several packages offer 'ocr' (a:ocr, b:ocr)" in complaint(folder, "ocr")


def test_the_installed_catalogue_is_listed() -> None:
    names = {entry.name for entry in importlib.metadata.entry_points(group="rlalign.rewards")}
    assert set(reward_names()) == names
