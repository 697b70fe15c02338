"""Kills at random moments, on a model that is quick to load; tests/chaos/kills.py does it on the shipped one."""

from pathlib import Path

import pytest

from tests.chaos.kills import finish, killed_run, result

RUN_FILE = """
model: {{family: analytic, means: [[0.0, 0.0], [2.0, 1.0]], lora: null}}
prompts: {{train: train.txt, heldout: heldout.txt}}
rollout: {{prompts_per_step: 4, samples_per_prompt: 4, num_steps: 5, size: [1, 2], micro_batch: 8}}
rewards: [{{use: "reward.py:first"}}]
algorithm: {{name: {algorithm}}}
optimizer: {{lr: 1.0e-2}}
ema: {{decay: 0.9, every: 2}}
evaluation: {{every: 5, num_images: 16, num_steps: 4}}
checkpoint: {{every: 2}}
steps: 24
"""
REWARD = """
import time

def first(images, prompts):
    time.sleep(0.01)  # so that there is something to kill
    return images[:, 0, 0, 0].double() / 255
"""


@pytest.mark.parametrize(("algorithm", "kills"), [("grpo", 2), ("nft", 5)])
def test_a_run_that_is_killed_equals_the_unbroken_one(tmp_path: Path, algorithm: str, kills: int) -> None:
    (tmp_path / "run.yaml").write_text(RUN_FILE.format(algorithm=algorithm))
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "train.txt").write_text("\n".join(f"prompt {i}" for i in range(10)))
    (tmp_path / "heldout.txt").write_text("\n".join(f"other {i}" for i in range(4)))
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    words = ["train", str(tmp_path / "run.yaml"), "--run-dir"]
    finish([*words, str(alone)])
    hit = killed_run([*words, str(broken)], broken, steps=24, kills=kills, seed=1)
    assert hit == kills, "the run ended before it was killed as often as meant"
    assert result(broken) == result(alone)
