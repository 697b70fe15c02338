"""A run that takes a second: known velocities in two dimensions, and the command line in this process.

run_file(tmp_path)                        # run.yaml with its prompts and reward beside it
done = call(capsys, "train", "run.yaml")  # the working directory must be that folder
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from rlalign import cli

RUN = """\
model: {family: analytic, means: [[0, 0], [2, 1]], lora: null}
prompts: {train: train.txt, heldout: heldout.txt}
rollout: {prompts_per_step: 2, samples_per_prompt: 8, num_steps: 4, size: [1, 2], micro_batch: 8}
rewards: [{use: "reward.py:first", retries: 0}]
algorithm: {name: grpo}
optimizer: {lr: 1e-4}
evaluation: {every: 2, num_images: 8, num_steps: 2}
checkpoint: {every: 1}
reporting: {tensorboard: false}
steps: 2
"""
REWARD = """\
import time

def first(images, prompts):
    "The first number of a sample."
    return images[:, 0, 0, 0].float() / 255

def raises(images, prompts):
    raise RuntimeError("the scorer is on fire")

def hangs(images, prompts):
    time.sleep(2)

def nan(images, prompts):
    return [float("nan")] * len(images)

def short(images, prompts):
    return [0.0]

def text(images, prompts):
    return ["good"] * len(images)

uncallable = 3
"""


def run_file(folder: Path) -> Path:
    (folder / "train.txt").write_text("a\nb\nc\n")
    (folder / "heldout.txt").write_text("d\ne\n")
    (folder / "reward.py").write_text(REWARD)
    path = folder / "run.yaml"
    path.write_text(RUN)
    return path


def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave no report.html and no pictures side by side, which take a second; one test has them."""
    monkeypatch.setattr("rlalign.commands.train.write_pages", lambda folder: None)


@dataclass(frozen=True, slots=True)
class Done:
    """What a command left on the screen."""

    code: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        return [line.removeprefix("rlalign: ") for line in self.err.splitlines() if line.startswith("rlalign: ")]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Done:
    capsys.readouterr()
    code = cli.run(arguments)
    out, err = capsys.readouterr()
    return Done(code, out, err)
