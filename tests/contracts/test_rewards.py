"""What every reward of the catalogue must keep, whatever it measures."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rlalign_rewards
from rlalign.scoring import Reward, RewardConfig, Scoring, load_reward, reward_names
from rlalign.types import Prompt, Unit

CATALOGUE = sorted(Path(rlalign_rewards.__file__).parent.glob("[!_]*.py"))
MAY_KNOW = ("rlalign.types", "rlalign.scoring", "rlalign_rewards")
SAMPLES = 4

# One that suits every reward: what composition reads, what ocr reads, what recorded reads.
PROMPTS = tuple(
    Prompt(
        f'a red circle and the text "{text}"',
        metadata={
            "tag": "colors",
            "include": [{"class": "circle", "count": 1, "color": "red"}],
            "text": text,
            "scores": [1, 0, 0.5, 0],
        },
    )
    for text in ("42", "CAT", "995")
)
UNIT = Unit(step=0, groups=(0, 1, 2), prompts=PROMPTS, samples=SAMPLES)


@pytest.fixture
def images() -> Tensor:
    """Noise, some of it faint on white. uint8 [12, 3, 32, 32]"""
    noise = torch.rand(len(PROMPTS) * SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    strength = torch.linspace(0, 1, len(noise)).reshape(-1, 1, 1, 1)
    return (255 * (1 - strength * noise)).round().to(torch.uint8)


@pytest.fixture(params=reward_names())
def reward(request: pytest.FixtureRequest) -> Reward:
    return load_reward(RewardConfig(use=request.param, retries=0))


def test_the_catalogue_is_installed() -> None:
    assert {"composition", "jpeg_compressibility", "jpeg_incompressibility", "ocr"} <= set(reward_names())


def test_it_is_documented_and_called_with_images_and_prompts(reward: Reward) -> None:
    assert inspect.getdoc(reward.function)
    assert list(inspect.signature(reward.function).parameters)[:2] == ["images", "prompts"]


def test_it_scores_every_picture(reward: Reward, images: Tensor) -> None:
    scores = Scoring([reward]).score(images, UNIT)
    assert scores.valid.all() and scores.total.shape == (3, SAMPLES) and scores.total.isfinite().all()


def test_it_scores_a_single_picture(reward: Reward, images: Tensor) -> None:
    unit = Unit(step=0, groups=(0,), prompts=PROMPTS[:1], samples=1)
    assert Scoring([reward]).score(images[:1], unit).valid.all()


def test_it_says_the_same_again(reward: Reward, images: Tensor) -> None:
    engine = Scoring([reward])
    assert torch.equal(engine.score(images, UNIT).total, engine.score(images, UNIT).total)


def test_it_leaves_its_pictures_alone(reward: Reward, images: Tensor) -> None:
    images = images / 255 if reward.differentiable else images
    before = images.clone()
    reward.function(images, [prompt for prompt in PROMPTS for _ in range(SAMPLES)])
    assert torch.equal(images, before)


def test_a_score_does_not_depend_on_its_neighbours(reward: Reward, images: Tensor) -> None:
    if reward.groupwise:
        pytest.skip("comparing is its business")
    whole = Scoring([reward]).score(images, UNIT).total
    for group in range(len(PROMPTS)):
        unit = Unit(step=0, groups=(group,), prompts=PROMPTS[group : group + 1], samples=SAMPLES)
        rows = slice(group * SAMPLES, (group + 1) * SAMPLES)
        assert torch.equal(Scoring([reward]).score(images[rows].flip(0), unit).total[0], whole[group].flip(0))


@pytest.mark.parametrize("path", CATALOGUE, ids=lambda path: path.stem)
def test_it_knows_nothing_of_rlalign_but_types_and_markers(path: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    assert [module for module in modules if module.startswith("rlalign") and not module.startswith(MAY_KNOW)] == []
