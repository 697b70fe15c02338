"""Who learns what: a batch dealt to learner ranks."""

import pytest
import torch
from torch import Tensor

from rlalign.pipeline import Batch, deal, split
from rlalign.types import Prompt

SAMPLES = 4


def batch_of(groups: int) -> Batch:
    units = split(3, tuple(Prompt(str(number)) for number in range(groups)), SAMPLES, micro_batch=8)  # two groups each
    return Batch(3, units, [f"reference {number}" for number in range(len(units))], [])


def numbered(groups: int) -> Tensor:
    """[P, G]: every row's place in the batch."""
    return torch.arange(groups * SAMPLES).reshape(groups, SAMPLES).float()


def test_a_single_rank_gets_the_whole_batch() -> None:
    batch, advantages, valid = batch_of(5), numbered(5), torch.ones(5, SAMPLES).bool()
    (share,) = deal(batch, advantages, valid, 1, 2)
    assert share[0] is batch.trajectories and share[1] is advantages and share[2:] == (3, valid)


@pytest.mark.parametrize("groups", [1, 2, 7, 12])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_every_group_is_learnt_once_and_in_the_optimizer_step_of_a_single_rank(
    groups: int, ranks: int, updates: int
) -> None:
    advantages, valid = numbered(groups), torch.rand(groups, SAMPLES, generator=torch.Generator().manual_seed(0)) < 0.7
    shares = deal(batch_of(groups), advantages, valid, ranks, updates)
    assert len(shares) == ranks
    for number, expected in enumerate(torch.arange(groups).tensor_split(updates)):
        rows = [own[turns == number] for _, own, _, _, turns, _ in shares]
        assert sorted(torch.cat(rows).flatten().tolist()) == advantages[expected].flatten().tolist()
        assert max(map(len, rows)) - min(map(len, rows)) <= 1
        assert {share[5][number] for share in shares} == {int(valid[expected].sum())}


def test_a_rank_gets_references_to_the_units_of_its_groups_alone() -> None:
    advantages, valid = numbered(7), numbered(7) % 3 > 0
    one, other = deal(batch_of(7), advantages, valid, 2, 4)  # optimizer steps on groups 0 1, 2 3, 4 5, 6
    assert one[0] == ["reference 0", "reference 1", "reference 2", "reference 3"]
    assert other[0] == ["reference 0", "reference 1", "reference 2"]
    assert one[4].tolist() == [0, -1, 1, -1, 2, -1, 3] and other[4].tolist() == [-1, 0, -1, 1, -1, 2]
    assert torch.equal(other[1], advantages[:6]) and torch.equal(other[3], valid[:6]) and other[2] == 3


def test_a_rank_without_groups_still_has_rows_to_run_passes_on() -> None:
    _, idle = deal(batch_of(1), numbered(1), torch.ones(1, SAMPLES).bool(), 2, 1)
    assert idle[0] == ["reference 0"] and idle[4].tolist() == [-1] and idle[5] == [SAMPLES]
