"""Every model family trains through the command line: two steps, on the conformance test's tiny folder of it."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from rlalign import cli
from rlalign.types import Prompt
from tests.contracts.families import FIRST, Case, rollout_settings
from tests.contracts.families.case import with_image
from tests.contracts.measured import note
from tests.runs import without_pages

REWARD = """
def bright(images, prompts):
    "How bright a picture or a film is."
    return images.float().flatten(1).mean(1) / 255
"""


def prompt_file(case: Case, path: Path, *texts: str) -> str:
    """Each with an image of its own, for models that start from one."""
    lines: list[dict[str, str]] = []
    for row, text in enumerate(texts):
        image = with_image(Prompt(text), row, case.size).image
        assert image is not None
        file = path.with_name(f"{path.stem}_{row}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        lines.append({"text": text} | ({"image": file.name} if case.images else {}))
    path.write_text("\n".join(map(json.dumps, lines)))
    return path.name


@pytest.fixture(params=product(sorted(FIRST), ["grpo", "nft"]), ids="-".join)
def run_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    case, folder = FIRST[request.param[0]], tmp_path
    (folder / "reward.py").write_text(REWARD)
    settings = rollout_settings(case)
    run: dict[str, Any] = {
        "model": {
            "family": case.module,
            "path": str(case.write(folder / "model")),
            "dtype": str(case.dtype).removeprefix("torch."),
            "lora": {"rank": 2},
            **case.config,
        },
        "prompts": {
            "train": prompt_file(case, folder / "train.jsonl", "red cat", "blue dog"),
            "heldout": prompt_file(case, folder / "heldout.jsonl", "two", "three"),
        },
        "rollout": {
            "prompts_per_step": 2,
            "samples_per_prompt": 2,
            "num_steps": 3,
            "size": list(settings.size),
            "micro_batch": 4,
            "guidance_scale": 2.0 if case.guided else 1.0,
            **({"kernel": settings.kernel} if request.param[1] == "grpo" else {}),  # NFT has no use for it
        },
        "algorithm": {"name": request.param[1]},
        "rewards": [{"use": "reward.py:bright"}],
        "optimizer": {"lr": 1e-3},
        "evaluation": {"every": 0, "num_images": 4, "samples_per_prompt": 2, "num_steps": 2},
        "checkpoint": {"every": 2},
        "reporting": {"tensorboard": False},
        "steps": 2,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def test_it_trains(
    run_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
):
    """On policy the ratio is 1 to the last bit, and the weights move."""
    without_pages(monkeypatch)
    run = tmp_path / "run"
    assert cli.run(["train", str(run_file), "--run-dir", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    config = yaml.safe_load(run_file.read_text())
    algorithm, ratios = config["algorithm"]["name"], [row.get("ratio/max_abs_dev", 0.0) for row in rows]  # NFT has none
    note(record_property, config["model"]["family"], **{f"{algorithm}_steps": len(rows), "ratio": max(ratios)})
    assert [row["step"] for row in rows] == [0, 1]
    assert all(0 < row["grad_norm"] < float("inf") for row in rows)
    assert max(ratios) == 0
    assert (run / "checkpoints" / "step_000002").is_dir()
