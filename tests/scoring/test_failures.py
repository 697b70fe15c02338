"""What a scorer does when a reward raises, hangs, lies or cannot tell."""

import asyncio
import logging
import math
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlalign.scoring import Reward, RewardConfig, RewardError, Scoring, require_valid_group
from rlalign.scoring.call import Spent, TimedOut
from rlalign.scoring.caller import GIVE_UP_AFTER
from rlalign.types import Prompt, Scores, Unit
from tests.scoring.helpers import Recorder, numbered_images, reward, rows_of, scoring

Function = Callable[[Tensor, Sequence[Prompt]], Any]


def raises(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    raise ZeroDivisionError("nothing to divide by")


def nan_at(*bad: int, value: float = math.nan) -> Function:
    """A reward that cannot tell for those rows."""

    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        rows = rows_of(images)
        return rows.where(~torch.isin(rows, torch.tensor(bad, dtype=rows.dtype)), value)

    return reward


def raises_on(*bad: int) -> Function:
    def reward(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if set(bad) & {int(row) for row in rows_of(images)}:
            raise RuntimeError("not this one")
        return rows_of(images)

    return reward


def valid_rows(scores: Scores) -> list[int]:
    return scores.valid.flatten().nonzero().flatten().tolist()


# --- the policy `fail` ------------------------------------------------------------------------------------------


def test_a_raised_error_names_reward_prompt_address_and_cause(images: Tensor, unit: Unit) -> None:
    with pytest.raises(RewardError) as caught:
        scoring(raises, name="beauty").score(images, unit)
    message = str(caught.value)
    for part in (
        "reward 'beauty' failed on 12 pictures",
        "the prompt 'cat 0' (step 7, group 10, sample 0 of the rollout)",
        "ZeroDivisionError: nothing to divide by (test_failures.py, line",
        "on_failure",
    ):
        assert part in message
    assert "\n" not in message
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == message  # it may come from another process


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_names_its_picture(images: Tensor, unit: Unit, value: float) -> None:
    with pytest.raises(
        RewardError, match=rf"gave {value:g} for 1 of 12 pictures.*'cat 1' \(step 7, group 11, sample 2"
    ):
        scoring(nan_at(6, value=value)).score(images, unit)


def test_too_large_for_float32_is_infinite(images: Tensor, unit: Unit) -> None:
    with pytest.raises(RewardError, match="gave inf"):
        scoring(lambda images, prompts: [1e300] * len(images)).score(images, unit)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "it returned None"),
        (0.5, "it returned 0.5"),
        ("twelve words", "it returned 'twelve words'"),
        (object(), "it returned a object"),
        ([], "it returned 0 numbers for 12 pictures"),
        ([1.0] * 11, "it returned 11 numbers for 12 pictures"),
        (["0.5"] * 12, "a list with '0.5' in it"),
        ([None] * 12, "a list with None in it"),
        ([[1.0]] * 12, "a list with a list in it"),
        ([torch.zeros(2)] * 12, "a list that is not numbers alone"),
        ([10**400] * 12, "a list that is not numbers alone"),
        (torch.zeros(12, 1), "a tensor of shape [12, 1] for 12 pictures"),
        (torch.zeros(()), "a tensor of shape [] for 12 pictures"),
        (torch.zeros(13), "13 numbers for 12 pictures"),
        (torch.zeros(12, dtype=torch.complex64), "complex numbers"),
        ({"points": torch.zeros(12)}, "a dict without 'score'; its keys are ['points']"),
        ({"score": torch.zeros(11)}, "'score' as 11 numbers"),
        ({"score": torch.zeros(12), "text": ["hi"] * 12}, "'text' as a list with 'hi' in it"),
        ({"score": torch.zeros(12), "parts": torch.zeros(3)}, "'parts' as 3 numbers"),
    ],
)
def test_a_wrong_answer_is_told_in_words(images: Tensor, unit: Unit, returned: object, said: str) -> None:
    with pytest.raises(RewardError) as caught:
        scoring(lambda images, prompts: returned).score(images, unit)
    assert said in str(caught.value)


def test_a_reward_that_ends_the_program_is_a_failed_call(images: Tensor, unit: Unit) -> None:
    with pytest.raises(RewardError, match="it raised SystemExit"):
        scoring(lambda images, prompts: sys.exit(3)).score(images, unit)


def test_a_long_prompt_is_cut_in_messages() -> None:
    unit = Unit(step=0, groups=(0,), prompts=(Prompt("x" * 500),), samples=2)
    with pytest.raises(RewardError) as caught:
        scoring(raises).score(numbered_images(2), unit)
    assert "x" * 77 + "..." in str(caught.value) and "x" * 78 not in str(caught.value)


# --- time --------------------------------------------------------------------------------------------------------


def test_a_hanging_reward_is_given_up_and_its_thread_named(
    images: Tensor, unit: Unit, release: threading.Event
) -> None:
    engine = scoring(lambda images, prompts: release.wait(), name="stuck", timeout_s=0.05)
    with pytest.raises(RewardError, match=r"no answer within 0\.05 s; its thread 'reward stuck' is left behind"):
        engine.score(images, unit)
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "reward stuck"] == [True]
    assert engine.stats()["runtime/reward/stuck/timeouts"] == 1


def test_a_hanging_coroutine_is_cancelled(images: Tensor, unit: Unit) -> None:
    ended = threading.Event()

    async def stuck(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return []

    with pytest.raises(RewardError, match=r"no answer within 0\.05 s"):
        scoring(stuck, timeout_s=0.05).score(images, unit)
    assert ended.wait(5)


def test_a_timeout_of_the_rewards_own_is_an_ordinary_error(images: Tensor, unit: Unit) -> None:
    async def impatient(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        raise TimeoutError("the database sleeps")

    engine = scoring(impatient)
    with pytest.raises(RewardError, match="TimeoutError: the database sleeps"):
        engine.score(images, unit)
    assert engine.stats()["runtime/reward/reward/errors"] == 1


# --- a process of its own ------------------------------------------------------------------------------------------


def works(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return rows_of(images)


def fills_memory(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    raise MemoryError


def fills_memory_of_torch(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return torch.empty(2**60, dtype=torch.uint8)


def hangs(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    time.sleep(2)
    return rows_of(images)


SPENDING = pytest.mark.parametrize("function", [fills_memory, fills_memory_of_torch, hangs])


@SPENDING
def test_a_process_that_worked_until_now_is_given_up(images: Tensor, unit: Unit, function: Function) -> None:
    todo = [works, works, function, function]
    one = reward(lambda *both: todo.pop(0)(*both), name="beauty", retries=1, timeout_s=0.2)
    engine = Scoring([one], replaceable=True)
    for _ in range(2):
        engine.score(images, unit)
    with pytest.raises(Spent, match=r"reward 'beauty' failed on 12 pictures, the first of the prompt 'cat 0'"):
        engine.score(images, unit)
    assert not todo  # only after the retries


@SPENDING
def test_in_a_fresh_process_the_policy_decides(images: Tensor, unit: Unit, function: Function) -> None:
    """Another one would fail as well."""
    with pytest.raises(RewardError, match="on_failure"):
        Scoring([reward(function, timeout_s=0.1)], replaceable=True).score(images, unit)
    dropping = Scoring([reward(function, timeout_s=0.1, on_failure="drop_sample")], replaceable=True)
    for _ in range(2):
        assert valid_rows(dropping.score(images, unit)) == []


def test_an_error_or_a_late_server_is_no_reason_to_give_up_a_process(images: Tensor, unit: Unit) -> None:
    def late(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise TimedOut("the server did not answer")  # as the remote reward does

    for function in (raises, late):
        todo = [works, function]
        engine = Scoring([reward(lambda *both, todo=todo: todo.pop(0)(*both))], replaceable=True)
        engine.score(images, unit)
        with pytest.raises(RewardError):
            engine.score(images, unit)


# --- retries -----------------------------------------------------------------------------------------------------


class Flaky:
    """Raises the first times, then works."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError("come back later")
        return rows_of(images)


def test_a_flaky_reward_is_tried_again(images: Tensor, unit: Unit, caplog: pytest.LogCaptureFixture) -> None:
    engine = scoring(Flaky(2), retries=2)
    with caplog.at_level(logging.WARNING, "rlalign"):
        assert engine.score(images, unit).valid.all()
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "reward 'reward', try 1 of 3: ConnectionError: come back later",
        "reward 'reward', try 2 of 3: ConnectionError: come back later",
    ]
    assert engine.stats()["runtime/reward/reward/errors"] == 2


def test_retries_are_bounded(images: Tensor, unit: Unit) -> None:
    flaky = Flaky(100)
    with pytest.raises(RewardError, match="come back later"):
        scoring(flaky, retries=3).score(images, unit)
    assert flaky.calls == 4


def test_pauses_double_up_to_a_minute(images: Tensor, unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(RewardError):
        scoring(Flaky(100), retries=5, backoff_s=5.0).score(images, unit)
    assert pauses == [5, 10, 20, 40, 60]


def test_a_retry_gets_clean_pictures(images: Tensor, unit: Unit) -> None:
    calls: list[Tensor] = []

    def spoils(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        calls.append(rows_of(images))
        images.zero_()
        if len(calls) == 1:
            raise ConnectionError("half way through")
        return calls[-1]

    assert torch.equal(scoring(spoils, retries=1).score(images, unit).total, torch.arange(12.0).reshape(3, 4))


# --- the policies that drop ----------------------------------------------------------------------------------------


def test_drop_sample_leaves_out_what_has_no_number(images: Tensor, unit: Unit) -> None:
    engine = scoring(nan_at(1, 6), on_failure="drop_sample")
    scores = engine.score(images, unit)
    assert valid_rows(scores) == [0, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert scores.rewards["reward"].values[0, 1] == 0 and scores.rewards["reward"].values[0, 2] == 2
    assert engine.stats()["runtime/reward/reward/dropped"] == 2


def test_drop_group_leaves_out_the_whole_group(images: Tensor, unit: Unit) -> None:
    engine = scoring(nan_at(6), on_failure="drop_group")
    scores = engine.score(images, unit)
    assert valid_rows(scores) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert torch.equal(scores.rewards["reward"].values[1], torch.zeros(4))
    assert engine.stats()["runtime/reward/reward/dropped"] == 4


@pytest.mark.parametrize(
    ("policy", "valid"),
    [("drop_sample", [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]), ("drop_group", [0, 1, 2, 3, 8, 9, 10, 11])],
)
def test_a_failed_call_of_a_few_pictures(images: Tensor, unit: Unit, policy: str, valid: list[int]) -> None:
    assert valid_rows(scoring(raises_on(4), on_failure=policy, batch_size=2).score(images, unit)) == valid


def test_a_wholly_failed_call_drops_all_its_rows(images: Tensor, unit: Unit) -> None:
    scores = scoring(raises, on_failure="drop_sample").score(images, unit)
    assert valid_rows(scores) == [] and not scores.total.any()


def test_all_nan_is_all_dropped(images: Tensor, unit: Unit) -> None:
    assert valid_rows(scoring(nan_at(*range(12)), on_failure="drop_sample").score(images, unit)) == []


@pytest.mark.parametrize(
    ("least", "valid"),
    [(1, [0, 1, 2, 3, 4, 8, 9, 10]), (2, [0, 1, 2, 3, 8, 9, 10]), (3, [0, 1, 2, 3, 8, 9, 10]), (4, [0, 1, 2, 3])],
)
def test_groups_need_a_least_number_of_valid_samples(images: Tensor, unit: Unit, least: int, valid: list[int]) -> None:
    one_left_one_missing = nan_at(5, 6, 7, 11)
    scores = scoring(one_left_one_missing, on_failure="drop_sample", min_group_size=least).score(images, unit)
    assert valid_rows(scores) == valid


def test_train_rewards_share_the_least_group_size(images: Tensor, unit: Unit) -> None:
    """Each leaves two or more of the first group, both together one."""
    engine = Scoring(
        [
            reward(nan_at(0, 1), name="one", on_failure="drop_sample"),
            reward(nan_at(2), name="two", on_failure="drop_sample"),
            reward(Recorder(), name="curve", role="monitor"),
        ]
    )
    scores = engine.score(images, unit, roles=("train", "monitor"))
    assert valid_rows(scores) == list(range(4, 12))
    assert not scores.rewards["two"].valid[0].any()
    assert scores.rewards["curve"].valid.all()


def test_groups_of_one_need_one_valid_sample() -> None:
    unit = Unit(step=0, groups=(0, 1), prompts=(Prompt("a"), Prompt("b")), samples=1)
    scores = scoring(nan_at(1), on_failure="drop_sample").score(numbered_images(2), unit)
    assert valid_rows(scores) == [0]


def test_a_failing_monitor_does_not_touch_training(images: Tensor, unit: Unit) -> None:
    broken = reward(raises, name="broken", role="monitor", on_failure="drop_sample")
    scores = Scoring([reward(Recorder(), name="good"), broken]).score(images, unit, roles=("train", "monitor"))
    assert scores.valid.all() and not scores.rewards["broken"].valid.any()


def test_a_step_without_a_valid_group_is_an_error(images: Tensor, unit: Unit) -> None:
    scores = scoring(nan_at(*range(11)), on_failure="drop_sample").score(images, unit)
    with pytest.raises(RewardError, match="step 7 has no group with valid rewards; pictures lost: reward 12 of 12"):
        require_valid_group(scores, step=7)
    require_valid_group(scoring(nan_at(0), on_failure="drop_sample").score(images, unit), step=7)
    require_valid_group(Scores({}), step=7)


# --- the circuit breaker ---------------------------------------------------------------------------------------------


def test_the_breaker_stops_calling_for_the_batch_and_then_probes(images: Tensor, unit: Unit) -> None:
    flaky = Flaky(7)
    engine = scoring(flaky, on_failure="drop_sample", batch_size=1, breaker_after=2, retries=1)
    assert valid_rows(engine.score(images, unit)) == []
    assert flaky.calls == 4  # two calls of two tries, not twelve of two
    assert valid_rows(engine.score(images, unit)) == []
    assert flaky.calls == 5  # one probe without a retry
    engine.score(images, unit)
    engine.score(images, unit)
    assert valid_rows(engine.score(images, unit)) == list(range(12))
    assert flaky.calls == 7 + 12


def test_a_success_closes_the_breaker(images: Tensor, unit: Unit) -> None:
    engine = scoring(raises_on(0, 2, 4, 6, 8, 10), on_failure="drop_sample", batch_size=1, breaker_after=2)
    assert valid_rows(engine.score(images, unit)) == [1, 3, 5, 7, 9, 11]


def test_nan_does_not_open_the_breaker(images: Tensor, unit: Unit) -> None:
    engine = scoring(nan_at(0, 1, 4, 5, 8, 9), on_failure="drop_sample", batch_size=1, breaker_after=1)
    assert valid_rows(engine.score(images, unit)) == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize("policy", ["drop_sample", "drop_group"])
def test_no_policy_goes_on_for_ever(images: Tensor, unit: Unit, policy: str) -> None:
    engine = scoring(raises, on_failure=policy)
    for _ in range(GIVE_UP_AFTER - 1):
        engine.score(images, unit)
    with pytest.raises(RewardError, match=f"given up after {GIVE_UP_AFTER} failed calls in a row"):
        engine.score(images, unit)


def test_a_groupwise_reward_fails_by_group(images: Tensor, unit: Unit) -> None:
    config = RewardConfig(use="own:rank", retries=0, on_failure="drop_group")
    scores = Scoring([Reward(config, raises_on(5), groupwise=True)]).score(images, unit)
    assert valid_rows(scores) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_stats_are_kept_when_the_run_fails(images: Tensor, unit: Unit) -> None:
    engine = scoring(raises, retries=1)
    with pytest.raises(RewardError):
        engine.score(images, unit)
    assert engine.stats()["runtime/reward/reward/errors"] == 2
