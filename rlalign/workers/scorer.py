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

    def __init__(self, rewards: Sequence[RewardConfig], folder: Path = Path(), replaceable: bool = False) -> None:
        """Paths of reward files count from ``folder``, the run file's. ``replaceable``: see `Scoring`."""
        self.scoring = Scoring(load_rewards(rewards, folder), replaceable)

    def score(self, images: Tensor, unit: Unit, roles: Collection[Role] = ("train",)) -> Scores:
        """images [B, (F,) 3, H, W] uint8, ordered by prompt; only rewards of these roles are computed."""
        scores = self.scoring.score(images, unit, roles)
        texts = tuple(prompt.title for prompt in unit.prompts)
        rms = pixel_distances(images, unit.samples)
        stats = self.scoring.stats()
        return replace(scores, prompts=texts, distance=group_distance(rms), nearest=nearest(rms), stats=stats)


def pixel_distances(images: Tensor, samples: int) -> Tensor:
    """[P, G, G] float32: root-mean-square pixel difference of each pair of a group, pixels in [0, 1]."""
    pixels = images.reshape(-1, samples, images[0].numel()).float() / 255  # [P, G, D]
    return torch.cdist(pixels, pixels, compute_mode="donot_use_mm_for_euclid_dist") / pixels.shape[-1] ** 0.5


def group_distance(distances: Tensor) -> Tensor:
    """[P, G, G] -> [P]: mean over the pairs of a group."""
    samples = distances.shape[1]
    return distances.sum((1, 2)) / max(samples * (samples - 1), 1)


def nearest(distances: Tensor) -> Tensor:
    """[P, G, G] -> [P, G]: from each sample to the closest other of its group."""
    own = torch.eye(distances.shape[1], dtype=torch.bool, device=distances.device)
    return distances.masked_fill(own, torch.inf).amin(2).nan_to_num(posinf=0.0)
