"""Judges over HTTP against a local server that judges by redness."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.scoring import RewardConfig, RewardError, Scoring, load_reward
from rlalign.scoring.call import CallFailed, TimedOut
from rlalign.types import Prompt, Unit
from rlalign_rewards.unified_reward import UnifiedReward
from rlalign_rewards.vlm_judge import VlmJudge, VlmWinRate, matches
from tests.rewards.stub import Stub, asked, said, serving, shown

PROMPTS = [Prompt(f"picture {number}") for number in range(4)]


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving() as stub:
        yield stub


def reds(*levels: float) -> Tensor:
    """uint8 [B, 3, 8, 8] of these reds."""
    images = torch.zeros(len(levels), 3, 8, 8)
    images[:, 0] = 255 * torch.tensor(levels)[:, None, None]
    return images.round().to(torch.uint8)


def unit(samples: int) -> Unit:
    return Unit(step=0, groups=(0,), prompts=(Prompt("a"),), samples=samples)


def test_a_mark_is_the_number_of_the_answer(stub: Stub) -> None:
    scores = VlmJudge(url=stub.url, model="judge")(reds(0, 0.2, 1, 0.6), PROMPTS)
    assert scores["score"] == pytest.approx([0, 2, 10, 6], abs=2e-2)
    assert {request["model"] for request in stub.requests} == {"judge"}
    assert {request["temperature"] for request in stub.requests} == {0}
    assert sorted(asked(request).split('"')[1] for request in stub.requests) == [prompt.text for prompt in PROMPTS]


def test_yes_is_the_share_of_its_probability(stub: Stub) -> None:
    scores = VlmJudge(url=stub.url, model="judge", mode="yes_no")(reds(0, 0.2, 1), PROMPTS[:3])
    assert scores["score"] == pytest.approx([0, 0.2, 1], abs=2e-3)
    assert scores["decided"] == pytest.approx([0.9, 0.9, 0.9], abs=2e-3)
    assert all(request["max_tokens"] == 1 and request["top_logprobs"] == 20 for request in stub.requests)


def test_the_question_can_be_the_users_own(stub: Stub) -> None:
    VlmJudge(url=stub.url, model="judge", question="{prompt}? {json} 0-10")(reds(0), PROMPTS[:1])
    assert asked(stub.requests[0]) == "picture 0? {json} 0-10"
    with pytest.raises(ValueError, match=r"does not contain \{prompt\}"):
        VlmJudge(url=stub.url, model="judge", question="Good?")


def test_the_unified_score_stands_behind_its_mark(stub: Stub) -> None:
    scores = UnifiedReward(url=stub.url)(reds(0, 0.4, 1), PROMPTS[:3])
    assert scores == pytest.approx([1, 2.6, 5], abs=1e-2)
    assert "Text Caption: [picture 0]" in asked(min(stub.requests, key=asked))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Score: 4", 4.0),
        ("Final Score: 3.5/5", 3.5),
        ("4", math.nan),
        ("Final Score: 9", math.nan),
        (None, math.nan),
    ],
)
def test_an_answer_without_a_score_is_beyond_judgement(stub: Stub, text: str | None, score: float) -> None:
    stub.answer = lambda request: said(text)
    assert UnifiedReward(url=stub.url)(reds(0), PROMPTS[:1]) == pytest.approx([score], nan_ok=True)


@pytest.mark.parametrize("text", ["very good", "11", "-3", ""])
def test_a_mark_out_of_its_range_is_none(stub: Stub, text: str) -> None:
    stub.answer = lambda request: said(text)
    assert math.isnan(VlmJudge(url=stub.url, model="judge")(reds(0), PROMPTS[:1])["score"][0])


def test_wins_and_half_of_ties_in_all_pairs(stub: Stub) -> None:
    rates = VlmWinRate(url=stub.url, model="judge")(reds(0.2, 0.8, 0.8, 0), [PROMPTS[0]] * 4)
    assert rates == pytest.approx([1 / 3, 2.5 / 3, 2.5 / 3, 0])
    assert len(stub.requests) == 12


def test_a_love_of_the_first_place_cancels(stub: Stub) -> None:
    stub.answer = lambda request: said("1")
    assert VlmWinRate(url=stub.url, model="judge")(reds(0.2, 0.8, 0), [PROMPTS[0]] * 3) == pytest.approx([0.5] * 3)


def test_fewer_opponents_cost_less_and_are_shared_out(stub: Stub) -> None:
    assert len(matches(8, None)) == len(matches(8, 4)) == 28
    few = matches(8, 2)
    assert len({frozenset(pair) for pair in few}) == 16
    assert all(sum(player in pair for pair in few) == 4 for player in range(8))
    VlmWinRate(url=stub.url, model="judge", opponents=1)(reds(*[0.1] * 6), [PROMPTS[0]] * 6)
    assert len(stub.requests) == 12


def test_the_reward_layer_gives_it_whole_groups(stub: Stub) -> None:
    reward = load_reward(RewardConfig(use="vlm_win_rate", options={"url": stub.url, "model": "judge"}))
    assert reward.groupwise
    assert Scoring([reward]).score(reds(0, 1), unit(2)).total.tolist() == [[0, 1]]


def test_of_a_video_the_middle_frame_is_judged(stub: Stub) -> None:
    videos = reds(0, 0.5, 1)[None]
    assert VlmJudge(url=stub.url, model="judge")(videos, PROMPTS[:1])["score"] == pytest.approx([5], abs=2e-2)


# --- what goes wrong


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ((500, b"out of\nmemory"), "answered 500 Internal Server Error: out of memory"),
        ((404, b""), "answered 404"),
        ((302, b""), "answered 302"),
        ((200, b"<html>"), "no completion"),
        ((200, b'{"choices": []}'), "no completion"),
        ((200, b'{"choices": [{"message": {"content": [1]}}]}'), "a list instead of text"),
        ((200, b" " * 5_000_000), "more than 4 MB"),
    ],
)
def test_what_is_no_answer_fails_the_call(stub: Stub, answer: tuple[int, bytes], complaint: str) -> None:
    stub.answer = lambda request: answer
    with pytest.raises(CallFailed, match=complaint):
        VlmJudge(url=stub.url, model="judge")(reds(0), PROMPTS[:1])


def test_a_server_that_does_not_answer_is_a_timeout(stub: Stub) -> None:
    stub.delay_s = 0.5
    with pytest.raises(TimedOut, match=r"no answer within 0\.1 s"):
        VlmJudge(url=stub.url, model="judge", timeout_s=0.1)(reds(0), PROMPTS[:1])


def test_a_server_that_is_not_there_fails_the_call() -> None:
    with pytest.raises(CallFailed, match="cannot be asked: ConnectError"):
        VlmJudge(url="http://127.0.0.1:9/v1", model="judge")(reds(0), PROMPTS[:1])


def test_a_server_without_probabilities_is_told_apart(stub: Stub) -> None:
    stub.answer = lambda request: said("Yes")
    with pytest.raises(CallFailed, match="gives no top_logprobs"):
        VlmJudge(url=stub.url, model="judge", mode="yes_no")(reds(0), PROMPTS[:1])


def test_the_layer_retries_and_then_drops(stub: Stub) -> None:
    def answer(request: dict[str, object]) -> dict[str, object] | tuple[int, bytes]:
        return (503, b"busy") if len(stub.requests) == 1 else said("no idea" if shown(request) == [1] else "7")

    stub.answer = answer
    options = {"url": stub.url, "model": "judge", "parallel": 1}
    config = RewardConfig(use="vlm_judge", options=options, backoff_s=0, on_failure="drop_sample", min_group_size=1)
    scores = Scoring([load_reward(config)]).score(reds(0, 0, 0, 1), unit(4))
    assert scores.valid.tolist() == [[True, True, True, False]]
    stub.answer = lambda request: (503, b"busy")
    config = RewardConfig(use="vlm_judge", options=options, retries=0)
    with pytest.raises(RewardError, match="answered 503 Service Unavailable: busy"):
        Scoring([load_reward(config)]).score(reds(0), unit(1))


def test_the_token_comes_from_the_environment(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    VlmJudge(url=stub.url, model="judge", token_env="JUDGE_TOKEN")(reds(0), PROMPTS[:1])
    assert stub.tokens == ["Bearer secret"]
    with pytest.raises(ValueError, match="the environment variable NO_TOKEN, which token_env names, is not set"):
        VlmJudge(url=stub.url, model="judge", token_env="NO_TOKEN")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"url": "localhost:8000"}, "is no endpoint"),
        ({"url": "http://me:word@host/v1"}, "without a password"),
        ({"url": "http://h/v1", "mode": "pairwise"}, "for pairs use vlm_win_rate"),
        ({"url": "http://h/v1", "parallel": 0}, "have to be positive"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        VlmJudge(model="judge", **options)
