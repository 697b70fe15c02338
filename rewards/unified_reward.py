"""UnifiedReward (https://arxiv.org/abs/2503.05236), served by vLLM or SGLang."""

import math
from collections.abc import Sequence

import httpx
from torch import Tensor

from rlalign.types import Prompt
from rlalign_rewards._vlm import Endpoint, middle, number_in

# The wording that the model was trained on, so it is not ours to improve.
_QUESTION = (
    "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
    "based on two key criteria:\n1. Alignment with the Caption: Assess how well this image aligns with the provided "
    "caption. Consider the accuracy of depicted objects, their relationships, and attributes as described in the "
    "caption.\n"
    "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score from 1 to 5 after 'Final "
    "Score:'.\nYour task is provided as follows:\nText Caption: [{prompt}]"
)


class UnifiedReward:
    """The mark that UnifiedReward gives to picture and prompt, over an OpenAI-compatible endpoint.

    Model: CodeGoat24/UnifiedReward-qwen-7b and its sizes, served on a GPU of its own:
    `vllm serve CodeGoat24/UnifiedReward-qwen-7b`, then `url` is http://HOST:8000/v1. Of a video the middle frame.
    Score: 1 to 5, what stands behind "Final Score:"; pictures of text-to-image models average 3.3 to 3.5. An answer
    without such a number is NaN.
    Licence: MIT by its model card, on top of the licence of the model it was made from.
    Known hacks: a dark style, gloss, text in the picture. Marks come in few steps, so that groups tie.
    Options: url, model (its name at the endpoint), token_env (the environment variable with the token), timeout_s (of
    one request, 30), parallel (requests at a time, 8), max_tokens (of an answer, 512).
    """

    def __init__(
        self,
        url: str,
        model: str = "CodeGoat24/UnifiedReward-qwen-7b",
        token_env: str | None = None,
        timeout_s: float = 30.0,
        parallel: int = 8,
        max_tokens: int = 512,
    ) -> None:
        self._endpoint = Endpoint(url, model, token_env, timeout_s, parallel)
        self._max_tokens = max_tokens

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        """images: uint8 [B, (F,) 3, H, W]"""
        return self._endpoint.ask_all(self._mark, list(zip(images, prompts, strict=True)))

    def _mark(self, client: httpx.Client, row: tuple[Tensor, Prompt]) -> float:
        question = _QUESTION.replace("{prompt}", row[1].text)
        choice = self._endpoint.choice(client, question, [middle(row[0])], max_tokens=self._max_tokens)
        _, mark, rest = (choice["message"]["content"] or "").rpartition("Final Score:")
        return number_in(rest, 1, 5) if mark else math.nan
