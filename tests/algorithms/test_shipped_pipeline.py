"""Every algorithm in the folder trains the shipped pipeline through the same loop and the command line."""

import json
from pathlib import Path

import pytest

from rlalign import cli, plugins
from rlalign.checkpoint import latest
from tests.runs import without_pages

SMALL = (
    "rewards=[{use: saturation}]",
    "rollout.prompts_per_step=2",
    "rollout.samples_per_prompt=4",
    "rollout.micro_batch=8",
    "evaluation.every=0",
    "evaluation.num_images=8",
    "reporting.tensorboard=false",
)

FITTING = {"spo": ["rollout.window.size=1"]}  # four samples are the candidates of one step


@pytest.mark.parametrize("name", plugins.names("algorithm"))
def test_it_trains_the_shipped_pipeline(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pages(monkeypatch)
    run = tmp_path / "run"
    words = [
        "train",
        "quickstart",
        f"algorithm={name}",
        *SMALL,
        *FITTING.get(name, []),
        "--steps",
        "1",
        "--run-dir",
        str(run),
    ]
    assert cli.run(words) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and all(row["grad_norm"] > 0 for row in rows)
    found = latest(run / "checkpoints")
    assert found is not None and found[0] == 1
