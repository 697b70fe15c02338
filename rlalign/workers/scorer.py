"""The scorer: pictures -> scores, through the reward layer."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rlalign.scoring import RewardConfig, Scoring, load_rewards
from rlalign.types import Role, Scores, Unit


class Scorer:
    """Plain class: owns the loaded rewards, their networks included."""

    def __init__(self, rewards: Sequence[RewardConfig], folder: Path = Path()) -> None:
        """Paths of reward files count from ``folder``, the run file's."""
        self.scoring = Scoring(load_rewards(rewards, folder))

    def score(self, images: Tensor, unit: Unit, roles: Collection[Role] = ("train",)) -> Scores:
        """images [B, (F,) 3, H, W] uint8, ordered by prompt; only rewards of these roles are computed."""
        scores = self.scoring.score(images, unit, roles)
        texts = tuple(prompt.text for prompt in unit.prompts)
        distance = group_distance(images, unit.samples)
        return replace(scores, prompts=texts, distance=distance, stats=self.scoring.stats())


def group_distance(images: Tensor, samples: int) -> Tensor:
    """[P] float32: mean over the pairs of a group of the root-mean-square pixel difference, pixels in [0, 1]."""
    pixels = images.reshape(-1, samples, images[0].numel()).float() / 255  # [P, G, D]
    rms = torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist") / pixels.shape[-1] ** 0.5
    return rms.sum((1, 2)) / max(samples * (samples - 1), 1)
