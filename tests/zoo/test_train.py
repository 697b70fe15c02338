"""The training script goes from drawn scenes to a diffusers folder, on the CPU."""

from pathlib import Path

import pytest
import torch

from rlalign.zoo import train
from rlalign.zoo.networks import Networks, build_tokenizer, load


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["train", *map(str, arguments)])
    train.main()


def test_draws_trains_and_assembles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scenes, vae, flow, folder = (tmp_path / name for name in ("scenes.safetensors", "vae", "flow", "folder"))
    monkeypatch.setattr(train, "_CHUNK", 200)
    run(monkeypatch, "draw", "--to", scenes, "--count", 200, "--workers", 1)
    few = ("--scenes", scenes, "--batch", 4, "--steps", 2, "--device", "cpu")
    run(monkeypatch, "vae", "--to", vae, *few)
    small = ("--width", 32, "--layers", 1, "--every", 2, "--images-each", 1)
    run(monkeypatch, "flow", "--vae", vae, "--to", flow, *few, *small)
    [kept] = flow.iterdir()
    run(monkeypatch, "assemble", "--vae", vae, "--networks", kept, "--to", folder)
    pipeline = load(folder)
    assert pipeline.transformer.config.caption_projection_dim == 32
    assert pipeline.vae.config.scaling_factor != 0.18215


def test_encodes_as_the_pipeline_does() -> None:
    networks = Networks(width=32, layers=1)
    pipeline = train.assemble(networks, train.build_vae((8, 8, 8)))
    prompts = ["a red circle", 'the text "42"']
    text, pooled = networks.encode(torch.tensor(build_tokenizer()(prompts, padding="max_length").input_ids))
    expected = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=0)
    assert text.equal(expected[0]) and pooled.equal(expected[2])


def test_a_clock_ends_with_the_first_budget() -> None:
    assert list(train.Clock(steps=3, seconds=1e6)) == [0, 1, 2]
    assert list(train.Clock(steps=3, seconds=1e-9)) == []
