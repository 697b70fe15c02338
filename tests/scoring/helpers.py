"""Pictures that name themselves: every pixel of row b is b, so that a reward can tell which rows it was given."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.scoring import Reward, RewardConfig, Scoring
from rlalign.types import Prompt, Unit


def three_groups() -> Unit:
    """Three prompts of four samples, in slots 10, 11 and 12 of step 7."""
    prompts = tuple(Prompt(f"cat {number}") for number in range(3))
    return Unit(step=7, groups=(10, 11, 12), prompts=prompts, samples=4)


def numbered_images(count: int) -> Tensor:
    """uint8 [count, 3, 8, 8]"""
    return torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8).clone()


def rows_of(images: Tensor) -> Tensor:
    """Which rows these pictures are. [b]"""
    return images.float().mean((1, 2, 3))


def reward(function: Callable[..., Any], **settings: Any) -> Reward:
    """As if loaded from a run file, without pauses or retries."""
    return Reward(
        RewardConfig(**{"use": "own:reward", "retries": 0, "backoff_s": 0.0, "timeout_s": 5.0} | settings), function
    )


def scoring(function: Callable[..., Any], **settings: Any) -> Scoring:
    return Scoring([reward(function, **settings)])


class Recorder:
    """A reward that scores every picture with its row and keeps what it was asked."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.texts: list[list[str]] = []

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.rows.append([int(row) for row in rows_of(images)])
        self.texts.append([prompt.text for prompt in prompts])
        return rows_of(images)
