"""Every shipped run file is planned, on a machine that has neither its weights nor its GPUs."""

import re
from pathlib import Path

import pytest

from rlalign import cli
from rlalign.config import RECIPES, recipes
from tests.published import FLUX, QWEN_IMAGE, SD35, published

CARDS = {
    name: found[1]
    for name in recipes()
    if (found := re.search(r"GPUs? of (\d+) GB", (RECIPES / f"{name}.yaml").read_text()))
}
"""GPU memory that the heads of run files name."""


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_is_planned(name: str, capsys: pytest.CaptureFixture[str]):
    """Exit code 0, with the work of a step and how to divide machines; no network, nothing of size is loaded."""
    assert cli.run(["plan", name, "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    words = {line.split()[0] for line in out.splitlines() if line and not line.startswith(" ")}
    assert {"model", "prompts", "rewards", "step", "rollout", "update", "split"} <= words


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family."""
    parts = {"flux": FLUX, "sd3": SD35, "qwen_image": QWEN_IMAGE}
    return {family: published(tmp_path_factory.mktemp("models") / family, own) for family, own in parts.items()}


def test_recipes_for_large_models_name_a_gpu():
    assert {name for name in recipes() if re.search("flux|sd35|qwen", name)} == CARDS.keys()


@pytest.mark.parametrize("name", CARDS)
def test_a_recipe_fits_the_gpu_that_it_names(name: str, models: dict[str, Path], capsys: pytest.CaptureFixture[str]):
    """By plan's estimate, with the published configs of its model."""
    (family,) = re.findall(r"^  family: (\w+)$", (RECIPES / f"{name}.yaml").read_text(), re.MULTILINE)
    assert cli.run(["plan", name, f"model.path={models[family]}", "--gpus", "8", "--gpu-memory", CARDS[name]]) == 0
    out = capsys.readouterr().out
    assert "activations are estimated" in out and "have, which is unknown" not in out
    assert f"more than the {CARDS[name]}.0 GiB" not in out
