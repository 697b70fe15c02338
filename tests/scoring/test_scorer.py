from pathlib import Path

import torch
from torch import Tensor

from rlalign.scoring import RewardConfig
from rlalign.types import Unit
from rlalign.workers.scorer import Scorer


def test_a_scorer_loads_from_the_run_files_folder_and_scores(images: Tensor, unit: Unit, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def row(images, prompts):\n    return images.float().mean((1, 2, 3))\n")
    rewards = [RewardConfig(use="mine.py:row", weight=2.0), RewardConfig(use="jpeg_compressibility", role="monitor")]
    scorer = Scorer(rewards, tmp_path)
    scores = scorer.score(images, unit, roles=("train", "monitor"))
    assert list(scores.rewards) == ["row", "jpeg_compressibility"]
    assert torch.equal(scores.total, 2 * torch.arange(12.0).reshape(3, 4))
    assert set(scores.stats) >= {"time/reward/row_s", "runtime/reward/jpeg_compressibility/dropped"}
