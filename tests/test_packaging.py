"""What is built is what stands in the tree: every module, every recipe, every weight."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLUTTER = shutil.ignore_patterns("__pycache__", "*.egg-info")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("rlalign", "rewards"):
        shutil.copytree(ROOT / name, tree / name, ignore=CLUTTER)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", build], cwd=tree, check=True, capture_output=True)
    return next((tree / "dist").glob("*.whl"))


def files(folder: Path, called: str) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {f"{called}/{path.as_posix()}" for path in found if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_whole_package_and_the_rewards(wheel: Path):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == files(ROOT / "rlalign", "rlalign") | files(ROOT / "rewards", "rlalign_rewards")


def test_the_wheel_imports_without_the_tree(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    show = "import rlalign, rlalign_rewards.composition as c; print(rlalign.__file__, c.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", show], cwd="/", env=env, check=True, capture_output=True, text=True)
    assert all(path.startswith(str(tmp_path)) for path in done.stdout.split())


@pytest.mark.parametrize("entry", entry_points(group="rlalign.rewards"), ids=lambda entry: entry.name)
def test_every_reward_of_the_catalogue_is_there(entry):
    assert callable(entry.load())
