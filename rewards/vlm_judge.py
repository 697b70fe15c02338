"""Any vision-language model as a judge: a mark, the probability of "yes" (VQAScore), or wins in pairs.

rewards:
  - use: vlm_judge
    batch_size: 16
    options: {url: "http://localhost:8000/v1", model: Qwen/Qwen3-VL-8B-Instruct, mode: yes_no}
"""

import math
import random
from collections.abc import Sequence
from itertools import combinations
from typing import Literal

import httpx
from torch import Tensor

from rlalign.scoring import groupwise
from rlalign.types import Prompt
from rlalign_rewards._vlm import Endpoint, middle, number_in, top_tokens

_SCORE = (
    'How well does the picture show "{prompt}"? Judge what is shown, how much, where and in which colours, and how '
    "well it is made. Answer with one number from 0 (not at all) to 10 (perfectly) and nothing else."
)
_YES_NO = 'Does this figure show "{prompt}"? Please answer yes or no.'
_PAIR = (
    'Two pictures were made for "{prompt}". Which of them shows it better? Answer with one digit and nothing else: 1 '
    "for the first, 2 for the second, 0 if neither is better."
)


class VlmJudge:
    """What a vision-language model says of picture and prompt: a mark, or how sure it is of "yes".

    Model: any behind an OpenAI-compatible endpoint `url` (.../v1), by the name it has there. mode score asks for a mark
    from 0 to 10, yes_no for one word of which the probability is taken, as VQAScore does
    (https://arxiv.org/abs/2404.01291); for that the server has to give top_logprobs. Of a video the middle frame.
    Score: mode score: 0 to 10, in whole numbers mostly, so that many ties appear in a group; mode yes_no:
    P(yes) / (P(yes) + P(no)) in [0, 1], with P(yes) + P(no) as the detail "decided". An answer without a number is NaN.
    Licence: that of the model; a provider's terms may forbid training on its answers.
    Known hacks: instructions written into the picture, showy text, whatever the model overlooks (counts, sides); marks
    drift with the wording and with the version of the model, so pin both.
    Options: url, model, mode, question (with {prompt} in it), token_env (the environment variable with the token),
    timeout_s (of one request, 30), parallel (requests at a time, 8), max_tokens (of a mark's answer, 64).
    """

    def __init__(
        self,
        url: str,
        model: str,
        mode: Literal["score", "yes_no"] = "score",
        question: str | None = None,
        token_env: str | None = None,
        timeout_s: float = 30.0,
        parallel: int = 8,
        max_tokens: int = 64,
    ) -> None:
        if mode not in ("score", "yes_no"):
            raise ValueError(f"mode {mode!r} is none of score, yes_no; for pairs use vlm_win_rate")
        self._endpoint = Endpoint(url, model, token_env, timeout_s, parallel)
        self._mode, self._max_tokens = mode, max_tokens
        self._question = with_prompt(question or (_SCORE if mode == "score" else _YES_NO))

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, list[float]]:
        """images: uint8 [B, (F,) 3, H, W]"""
        ask = self._mark if self._mode == "score" else self._yes
        answers = self._endpoint.ask_all(ask, list(zip(images, prompts, strict=True)))
        return {"score": [score for score, _ in answers]} | (
            {"decided": [mass for _, mass in answers]} if self._mode == "yes_no" else {}
        )

    def _mark(self, client: httpx.Client, row: tuple[Tensor, Prompt]) -> tuple[float, float]:
        question = self._question.replace("{prompt}", row[1].text)
        choice = self._endpoint.choice(client, question, [middle(row[0])], max_tokens=self._max_tokens)
        return number_in(choice["message"]["content"], 0, 10), 1.0

    def _yes(self, client: httpx.Client, row: tuple[Tensor, Prompt]) -> tuple[float, float]:
        question = self._question.replace("{prompt}", row[1].text)
        extra = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        choice = self._endpoint.choice(client, question, [middle(row[0])], **extra)
        mass = {"yes": 0.0, "no": 0.0}
        for token, logprob in top_tokens(choice).items():
            word = token.strip().lower()
            if word in mass:
                mass[word] += math.exp(logprob)
        total = sum(mass.values())
        return (mass["yes"] / total if total else math.nan), total


@groupwise
class VlmWinRate:
    """How often a vision-language model prefers the picture to the others of its prompt; every pair asked both ways.

    Model: any behind an OpenAI-compatible endpoint `url` (.../v1), by the name it has there. Of a video the middle
    frame.
    Score: wins plus half the ties, over comparisons, in [0, 1]; a group's mean is 1/2, so it says nothing of progress
    (https://arxiv.org/abs/2508.20751 trains with it). A group of one gets 1/2. `opponents` bounds the cost: G pictures
    take G(G-1) requests, or about 2 G `opponents`. An answer that is no 0, 1 or 2 counts as a tie.
    Licence: that of the model; a provider's terms may forbid training on its answers.
    Known hacks: as vlm_judge; a preference for the first place is taken out by asking both ways, one for gloss is not.
    Options: url, model, question (with {prompt} in it), opponents, token_env, timeout_s (of one request, 30), parallel
    (requests at a time, 8).
    """

    def __init__(
        self,
        url: str,
        model: str,
        question: str | None = None,
        opponents: int | None = None,
        token_env: str | None = None,
        timeout_s: float = 30.0,
        parallel: int = 8,
    ) -> None:
        if opponents is not None and opponents < 1:
            raise ValueError(f"opponents is {opponents}; a picture needs one at least")
        self._endpoint = Endpoint(url, model, token_env, timeout_s, parallel)
        self._question, self._opponents = with_prompt(question or _PAIR), opponents

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        """images: uint8 [G, (F,) 3, H, W] of one prompt"""
        question = self._question.replace("{prompt}", prompts[0].text)
        pairs = [way for a, b in matches(len(images), self._opponents) for way in ((a, b), (b, a))]

        def ask(client: httpx.Client, pair: tuple[int, int]) -> float:
            shown = [middle(images[row]) for row in pair]
            choice = self._endpoint.choice(client, question, shown, max_tokens=8)
            return {1.0: 1.0, 2.0: 0.0}.get(number_in(choice["message"]["content"], 0, 2), 0.5)

        won = self._endpoint.ask_all(ask, pairs)
        points, played = [0.0] * len(images), [0] * len(images)
        for (first, second), result in zip(pairs, won, strict=True):
            points[first] += result
            points[second] += 1 - result
            played[first] += 1
            played[second] += 1
        return [mine / games if games else 0.5 for mine, games in zip(points, played, strict=True)]


def matches(players: int, opponents: int | None) -> list[tuple[int, int]]:
    """Every pair, or of a circle in a fixed random order the next `opponents` of everyone."""
    if opponents is None or opponents >= (players - 1) / 2:
        return list(combinations(range(players), 2))
    order = random.Random(players).sample(range(players), players)
    return [(order[i], order[(i + d) % players]) for d in range(1, opponents + 1) for i in range(players)]


def with_prompt(question: str) -> str:
    if "{prompt}" not in question:
        raise ValueError(f"the question {question!r:.60} does not contain {{prompt}}, where the prompt goes")
    return question
