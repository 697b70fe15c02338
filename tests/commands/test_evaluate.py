"""`rlalign evaluate --features`: how far a run's pictures are from others, by a network on this machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rlalign.scoring import RewardError
from tests.evaluation.networks import clip_folder
from tests.runs import Done, call, run_file, without_pages
from tests.tiny import sd3_folder

Capture = pytest.CaptureFixture[str]
SETTINGS = ["model={family: sd3, path: ./tiny, text_encoder_3: false, max_sequence_length: 0, lora: {rank: 2}}"]
SETTINGS += ["rollout.size=[16,16]", "rewards=jpeg_compressibility", "optimizer.lr=1e-1", "evaluation.num_images=16"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    run_file(tmp_path)
    sd3_folder(tmp_path / "tiny")
    clip_folder(tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    without_pages(monkeypatch)
    return tmp_path


def evaluated(capsys: Capture, of: str, *more: str) -> tuple[Done, dict[str, Any]]:
    overrides = SETTINGS if of == "run.yaml" else []
    done = call(capsys, "evaluate", of, *overrides, "--to", "out", "--features", "clip", *more)
    return done, json.loads(Path("out/metrics.json").read_text()) if done.code == 0 else {}


def test_the_untrained_model_is_no_way_from_itself(here: Path, capsys: Capture):
    """The same prompts from the same noise are the same pictures."""
    done, found = evaluated(capsys, "run.yaml")
    assert done.code == 0, done.err
    assert found["fid"] == pytest.approx(0, abs=1e-4) and found["reference"] == "base"
    assert found["reference_images"] == 16 and found["features"] == "clip"
    assert "compare it at equal numbers" in done.out


@pytest.mark.parametrize("lora", [True, False])
def test_training_moves_the_pictures_away_from_the_bases(here: Path, capsys: Capture, lora: bool):
    whole = [] if lora else ["model.lora=null", "optimizer.lr=1e-2"]
    assert call(capsys, "train", "run.yaml", *SETTINGS, *whole).code == 0
    done, found = evaluated(capsys, "runs/run", "--weights", "policy", "--reference", "base")
    assert done.code == 0, done.err
    assert found["fid"] > 1e-3 and found["step"] == 2
    plain = call(capsys, "evaluate", "runs/run", "--weights", "policy", "--to", "plain")
    other = json.loads(Path("plain/metrics.json").read_text())
    assert plain.code == 0 and "fid" not in other
    assert other["reward/mean"] == found["reward/mean"], "looking at features changes nothing"


def test_pictures_of_a_folder(here: Path, capsys: Capture):
    """Of any size; those of the model itself are nearer than noise."""
    call(capsys, "sample", "run.yaml", *SETTINGS, "--num", "4", "--steps", "2", "--to", "own")
    assert Path("own/grid.png").exists()  # which is no picture of the model's
    generator = torch.Generator().manual_seed(0)
    Path("noise").mkdir()
    for number in range(8):
        pixels = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(f"noise/{number}.jpg")
    near, far = (evaluated(capsys, "run.yaml", "--reference", folder)[1] for folder in ("own", "noise"))
    assert near["reference_images"] == 32 and far["reference_images"] == 8
    assert near["kid"] < far["kid"] and near["fid"] < far["fid"]


def test_every_evaluation_has_its_folder_and_says_its_settings(here: Path, capsys: Capture):
    for name in ("exp.a", "exp.b"):
        assert call(capsys, "train", "run.yaml", *SETTINGS, "--run-dir", f"runs/{name}").code == 0
    changed = ["evaluation.guidance_scale=4.5", "evaluation.num_steps=3"]
    for arguments in (["runs/exp.a"], ["runs/exp.a/", *changed], ["runs/exp.b"]):
        assert call(capsys, "evaluate", *arguments).code == 0
    folders = sorted(path.name for path in Path("evaluations").iterdir())
    assert folders == ["exp.a_step_000002", "exp.a_step_000002_2", "exp.b_step_000002"]
    plain, other = (json.loads(Path("evaluations", name, "metrics.json").read_text()) for name in folders[:2])
    assert other["overrides"] == changed and plain["overrides"] == []
    told = other["evaluation"]
    assert (told["guidance_scale"], told["num_steps"], told["solver"]) == (4.5, 3, "euler")
    assert plain["evaluation"]["guidance_scale"] == 1


def test_a_late_failure_leaves_the_evaluation(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments: Any) -> None:
        raise RewardError("a GPU went away")

    monkeypatch.setattr("rlalign.commands.evaluate.base_pictures", broken)
    done = call(capsys, "evaluate", "run.yaml", *SETTINGS, "--to", "out", "--features", "clip")
    assert done.code == 2 and done.complaints == ["a GPU went away"]
    assert "reward/mean" in json.loads(Path("out/metrics.json").read_text()) and Path("out/grid.png").exists()


def test_what_is_wrong_is_said_before_anything_is_loaded(here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlalign.commands.evaluate.build", lambda config: pytest.fail("it was loaded"))
    (here / "empty").mkdir()
    for folder, number in (("few", 3), ("damaged", 4)):
        (here / folder).mkdir()
        for which in range(number):
            Image.new("RGB", (8, 8)).save(here / folder / f"{which}.png")
    (here / "damaged" / "1.png").write_bytes(b"no")
    for arguments, words in (
        (["--reference", "base"], "--features PATH"),
        (["--features", "clip", "--reference", "empty"], "no pictures in that folder"),
        (["--features", "clip", "--reference", "few"], "need 4 pictures of each kind or more, and there are 3"),
        (["--features", "clip", "evaluation={num_images: 2, samples_per_prompt: 2}"], "and there are 2"),
        (["--features", "clip", "--reference", "damaged"], "damaged/1.png"),
        (["--features", "tiny"], "is no network"),
    ):
        done = call(capsys, "evaluate", "run.yaml", *SETTINGS, *arguments)
        (sentence,) = done.complaints
        assert done.code == 2 and words in sentence
