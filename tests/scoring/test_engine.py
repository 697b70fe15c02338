"""What a scorer does with its rewards when all goes well."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from rlalign.scoring import Reward, RewardConfig, Scoring
from rlalign.types import Prompt, Role, Unit
from tests.scoring.helpers import Recorder, reward, rows_of, scoring


def test_rows_are_ordered_by_prompt_and_prompts_repeated(images: Tensor, unit: Unit) -> None:
    recorder = Recorder()
    scores = scoring(recorder).score(images, unit)
    assert recorder.rows == [list(range(12))]
    assert recorder.texts == [["cat 0"] * 4 + ["cat 1"] * 4 + ["cat 2"] * 4]
    assert torch.equal(scores.rewards["reward"].values, torch.arange(12.0).reshape(3, 4))
    assert scores.valid.all()


def test_total_is_the_weighted_sum_of_the_train_rewards(images: Tensor, unit: Unit) -> None:
    engine = Scoring(
        [
            reward(lambda images, prompts: rows_of(images), name="up", weight=2.0),
            reward(lambda images, prompts: rows_of(images) + 1, name="down", weight=-1.0),
            reward(lambda images, prompts: rows_of(images) * 1e6, name="curve", role="monitor"),
        ]
    )
    scores = engine.score(images, unit, roles=("train", "monitor"))
    assert list(scores.rewards) == ["up", "down", "curve"]
    assert torch.equal(scores.total, torch.arange(12.0).reshape(3, 4) - 1)


@pytest.mark.parametrize("role", ["monitor", "heldout"])
def test_a_reward_that_is_not_due_is_not_called(images: Tensor, unit: Unit, role: Role) -> None:
    idle = Recorder()
    engine = Scoring([reward(Recorder(), name="busy"), reward(idle, name="idle", role=role)])
    assert list(engine.score(images, unit).rewards) == ["busy"]
    assert idle.rows == []
    assert not any("idle" in key for key in engine.stats())
    assert list(engine.score(images, unit, roles=("train", role)).rewards) == ["busy", "idle"]
    assert len(idle.rows) == 1
    assert list(engine.score(images, unit, roles=(role,)).rewards) == ["idle"]


def test_a_groupwise_reward_gets_one_group_in_a_call(images: Tensor, unit: Unit) -> None:
    recorder = Recorder()
    config = RewardConfig(use="own:rank")
    scores = Scoring([Reward(config, recorder, groupwise=True)]).score(images, unit)
    assert recorder.rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [set(texts) for texts in recorder.texts] == [{"cat 0"}, {"cat 1"}, {"cat 2"}]
    assert torch.equal(scores.total, torch.arange(12.0).reshape(3, 4))


def test_a_batch_size_is_kept_by_repeating_the_last_picture(images: Tensor, unit: Unit) -> None:
    recorder = Recorder()
    scores = scoring(recorder, batch_size=5).score(images, unit)
    assert recorder.rows == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 11, 11, 11]]
    assert torch.equal(scores.total, torch.arange(12.0).reshape(3, 4))


def test_a_differentiable_reward_gets_floats(images: Tensor, unit: Unit) -> None:
    seen: list[Tensor] = []

    def brightness(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append(images)
        return images.mean((1, 2, 3))

    scores = Scoring([Reward(RewardConfig(use="own:brightness"), brightness, differentiable=True)]).score(images, unit)
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(scores.total, torch.arange(12.0).reshape(3, 4) / 255)


def test_videos_pass_through(unit: Unit) -> None:
    video = torch.zeros(12, 5, 3, 8, 8, dtype=torch.uint8)
    scores = scoring(lambda images, prompts: [images.shape[1]] * len(images)).score(video, unit)
    assert torch.equal(scores.total, torch.full((3, 4), 5.0))


@pytest.mark.parametrize(
    "as_kind",
    [
        lambda rows: rows.tolist(),
        lambda rows: tuple(rows.tolist()),
        lambda rows: rows.double(),
        lambda rows: rows.int(),
        lambda rows: rows.clone().requires_grad_(),
        lambda rows: rows.numpy(),
        lambda rows: list(rows.numpy()),
        lambda rows: list(rows),
        lambda rows: {"score": rows},
        lambda rows: {"score": rows.tolist(), "extra": rows.numpy()},
    ],
)
def test_scores_come_as_any_row_of_numbers(images: Tensor, unit: Unit, as_kind: object) -> None:
    assert callable(as_kind)
    scores = scoring(lambda images, prompts: as_kind(rows_of(images))).score(images, unit)
    values = scores.rewards["reward"].values
    assert torch.equal(values, torch.arange(12.0).reshape(3, 4))
    assert values.dtype == torch.float32 and not values.requires_grad


def test_booleans_are_numbers(images: Tensor, unit: Unit) -> None:
    scores = scoring(lambda images, prompts: [bool(row > 5) for row in rows_of(images)]).score(images, unit)
    assert scores.total.sum() == 6


def test_details_go_along_and_may_be_nan(images: Tensor, unit: Unit) -> None:
    def detailed(images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        rows = rows_of(images)
        return {"score": rows, "task/counting": rows.where(rows > 3, torch.nan)}

    scores = scoring(detailed, batch_size=4).score(images, unit)
    detail = scores.rewards["reward"].details["task/counting"]
    assert (
        detail.shape == (3, 4)
        and detail[0].isnan().all()
        and torch.equal(detail[1:], torch.arange(4.0, 12).reshape(2, 4))
    )
    assert scores.valid.all()


def test_a_coroutine_function(images: Tensor, unit: Unit) -> None:
    async def slow(images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
        await asyncio.sleep(0)
        return rows_of(images).tolist()

    assert torch.equal(scoring(slow).score(images, unit).total, torch.arange(12.0).reshape(3, 4))


def test_a_class_with_a_coroutine_call(images: Tensor, unit: Unit) -> None:
    class Slow:
        async def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> list[float]:
            return rows_of(images).tolist()

    assert torch.equal(scoring(Slow()).score(images, unit).total, torch.arange(12.0).reshape(3, 4))


def test_a_reward_that_paints_over_its_pictures_harms_nobody(images: Tensor, unit: Unit) -> None:
    def vandal(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        images.zero_()
        return rows_of(images)

    before = images.clone()
    engine = Scoring([reward(vandal, name="first"), reward(Recorder(), name="second")])
    scores = engine.score(images, unit)
    assert torch.equal(images, before)
    assert torch.equal(scores.rewards["second"].values, torch.arange(12.0).reshape(3, 4))


def test_rewards_run_without_gradients_and_with_the_threads_of_the_process(images: Tensor, unit: Unit) -> None:
    seen: list[tuple[bool, int]] = []

    def spy(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        seen.append((torch.is_grad_enabled(), torch.get_num_threads()))
        return rows_of(images)

    scoring(spy).score(images, unit)
    assert seen == [(False, torch.get_num_threads())]


def test_repeated_scoring_is_the_same(unit: Unit) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8))
    engine = scoring(lambda images, prompts: images.float().std((1, 2, 3)))
    assert torch.equal(engine.score(images, unit).total, engine.score(images, unit).total)


def test_stats_count_since_they_were_last_read(images: Tensor, unit: Unit) -> None:
    engine = scoring(Recorder())
    engine.score(images, unit)
    engine.score(images, unit)
    stats = engine.stats()
    assert stats.pop("time/reward/reward_s") > 0
    assert stats == {f"runtime/reward/reward/{key}": 0 for key in ("errors", "timeouts", "dropped")}
    assert engine.stats() == {}


def test_no_thread_is_left_when_all_goes_well(images: Tensor, unit: Unit) -> None:
    scoring(Recorder(), name="tidy").score(images, unit)
    for thread in threading.enumerate():
        if thread.name == "reward tidy":
            thread.join(timeout=5)
    assert not any(thread.name == "reward tidy" for thread in threading.enumerate())
