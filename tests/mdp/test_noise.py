import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlalign.mdp.noise import Noise

NOISE = Noise(0)


def addresses(count: int, step: int = 3) -> Tensor:
    """[count, 3]: groups of four."""
    rows = torch.arange(count)
    return torch.stack([torch.full_like(rows, step), rows // 4, rows % 4], 1)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), count=st.integers(1, 9))
def test_a_row_does_not_know_its_batch(data: st.DataObject, count: int) -> None:
    whole = NOISE.normal("step", addresses(9), 2, (3, 4))
    order = torch.tensor(data.draw(st.permutations(range(9)))[:count])
    assert torch.equal(NOISE.normal("step", addresses(9)[order], 2, (3, 4)), whole[order])


def test_shape_only_folds_a_row() -> None:
    flat = NOISE.normal("step", addresses(2), 0, (24,))
    assert torch.equal(NOISE.normal("step", addresses(2), 0, (2, 3, 4)), flat.reshape(2, 2, 3, 4))
    assert NOISE.normal("step", addresses(2), 0, ()).shape == (2,)


def test_every_part_of_the_address_counts() -> None:
    base = NOISE.normal("step", addresses(1), 1, (64,))
    step, group, sample = (addresses(1) + torch.eye(3, dtype=torch.int64)[i] for i in range(3))
    others = [
        Noise(1).normal("step", addresses(1), 1, (64,)),
        NOISE.normal("initial", addresses(1), 1, (64,)),
        NOISE.normal("step", addresses(1), 2, (64,)),
        *(NOISE.normal("step", moved, 1, (64,)) for moved in (step, group, sample)),
    ]
    for other in others:
        assert not torch.isin(other, base).any()
    assert torch.equal(Noise(0).normal("step", addresses(1), 1, (64,)), base)


def test_parts_of_an_address_do_not_run_together() -> None:
    def drawn(seed: int, purpose: str, address: list[int], index: int) -> Tensor:
        return Noise(seed).normal(purpose, torch.tensor([address]), index, (8,))

    alike = [
        drawn(1, "a", [2, 3, 4], 5),
        drawn(12, "a", [3, 4, 5], 0),
        drawn(1, "5 a", [2, 3, 4], 5),
        drawn(1, "a", [23, 4, 5], 5),
    ]
    for i, one in enumerate(alike):
        assert not any(torch.equal(one, other) for other in alike[:i])


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(10**40)])
def test_any_integer_is_a_seed(seed: int) -> None:
    assert Noise(seed).normal("step", addresses(2), 0, (5,)).isfinite().all()


def test_normal_numbers_are_normal_and_independent() -> None:
    z = NOISE.normal("step", addresses(400), 0, (500,), torch.float64)
    count = z.numel()
    assert abs(z.mean().item()) < 4 / math.sqrt(count)
    assert abs(z.var().item() - 1) < 4 * math.sqrt(2 / count)
    assert abs((z**3).mean().item()) < 4 * math.sqrt(15 / count)
    assert abs((z**4).mean().item() - 3) < 4 * math.sqrt(96 / count)
    between = torch.corrcoef(z) - torch.eye(400)
    assert between.abs().max() < 6 / math.sqrt(500)
    steps = NOISE.normal("step", addresses(400), 1, (500,), torch.float64)
    assert abs((z * steps).mean().item()) < 4 / math.sqrt(count)


def test_uniform_numbers_are_uniform() -> None:
    u = NOISE.uniform("time", addresses(400), 0, (250,))
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - 5000).square() / 5000).sum() < 43.8  # chi squared, 19 degrees of freedom, p = 0.001


def test_integers_and_permutations() -> None:
    drawn = torch.tensor([NOISE.integer("window", (0, group, 0), 5) for group in range(5000)])
    counts = drawn.bincount(minlength=5)
    assert len(counts) == 5 and ((counts - 1000).square() / 1000).sum() < 18.5  # 4 degrees of freedom, p = 0.001
    orders = [NOISE.permutation("steps", (0, group, 0), 6) for group in range(50)]
    assert all(torch.equal(order.sort().values, torch.arange(6)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) > 40
    assert orders[0].dtype == torch.int64


def test_precision() -> None:
    single, double = (NOISE.normal("step", addresses(1), 0, (4,), dtype) for dtype in (torch.float32, torch.float64))
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    rounded = NOISE.normal("step", addresses(1), 0, (4,), torch.bfloat16)
    assert torch.equal(rounded, single.bfloat16())


def test_the_numbers_themselves() -> None:
    """A run resumed elsewhere meets the same noise: these stay as they are."""
    address = torch.tensor([[7, 2, 5]])
    torch.testing.assert_close(Noise(42).normal("step", address, 3, (3,))[0], torch.tensor(GOLDEN_NORMAL))
    torch.testing.assert_close(Noise(42).uniform("time", address, 3, (3,))[0], torch.tensor(GOLDEN_UNIFORM))
    assert [Noise(42).integer("window", (7, 2, sample), 100) for sample in range(4)] == GOLDEN_INTEGERS
    assert Noise(42).permutation("steps", (7, 2, 0), 6).tolist() == GOLDEN_PERMUTATION


GOLDEN_NORMAL = [-0.1122894287109375, -1.523758053779602, 1.3676375150680542]
GOLDEN_UNIFORM = [0.9001463651657104, 0.20120900869369507, 0.2950705289840698]
GOLDEN_INTEGERS = [53, 40, 35, 83]
GOLDEN_PERMUTATION = [2, 5, 4, 1, 3, 0]
