"""A reward for pictures, asked of the frames of a film.

    rewards:
      - {use: video_frames, options: {of: pickscore, reduce: mean, every: 4}}

Frames are judged one by one: nothing here sees motion, and a film that stands still can score best.
"""

import inspect
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rlalign.scoring import RewardConfig, load_reward
from rlalign.scoring.answer import checked
from rlalign.types import Prompt


class VideoFrames:
    """The mean or the least of the frames' scores; a detail is the mean over the frames that it applies to.

    ``of`` names the reward as `use` does, but paths count from the working directory; ``options`` are its own.
    ``reduce`` is mean or min. Every ``every``-th frame is asked, the first one always. A film is beyond judgement where
    one of those frames is.

    Score: that of the reward asked, on its scale; frames are judged one by one.
    Known hacks: those of the reward asked, and a film that stands still.
    """

    def __init__(
        self,
        of: str = "jpeg_compressibility",
        reduce: Literal["mean", "min"] = "mean",
        every: int = 1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if reduce not in ("mean", "min"):
            raise ValueError(f"reduce is {reduce!r}; it can be mean or min")
        if every < 1:
            raise ValueError(f"every is {every}; it counts frames and must be 1 or more")
        self.reward = load_reward(RewardConfig(use=of, options=dict(options or {})))
        if self.reward.groupwise:
            raise ValueError(f"{of} compares the pictures of a prompt, which the frames of films are not")
        self.reduce: Literal["mean", "min"] = reduce
        self.every = every

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> object:
        """One number a film, and the reward's details. images: uint8 [B, (F,) 3, H, W]"""
        films = images if images.ndim == 5 else images[:, None]
        frames = films[:, :: self.every]  # [B, K, 3, H, W]
        asked = frames.flatten(0, 1) / 255 if self.reward.differentiable else frames.flatten(0, 1)
        rows = [prompt for prompt in prompts for _ in range(frames.shape[1])]
        answer, shape = self.reward.function(asked, rows), frames.shape[:2]
        return self._later(answer, shape) if inspect.isawaitable(answer) else self._reduced(answer, shape)

    async def _later(self, answer: Awaitable[object], shape: torch.Size) -> dict[str, Tensor]:
        return self._reduced(await answer, shape)

    def _reduced(self, answer: object, shape: torch.Size) -> dict[str, Tensor]:
        """From a number for each frame, [B, K] of them, to one for each film [B]."""
        numbers = checked(answer, shape.numel())
        score = numbers.score.reshape(shape)
        details = {name: torch.nanmean(values.reshape(shape), 1) for name, values in numbers.details.items()}
        return {**details, "score": score.mean(1) if self.reduce == "mean" else score.amin(1)}
