"""RWR: the weights, and the law that one exact round makes."""

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rlalign.algorithms.rwr import Algorithm, Config, group_softmax
from rlalign.types import RewardScores, Scores

from .gaussians import GRID, in_errors, passes, tilted


def scores(rewards: list[list[float]], valid: list[list[bool]] | None = None) -> Scores:
    values = torch.tensor(rewards)
    real = torch.ones_like(values, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Scores({"r": RewardScores(values, real, "train", 1.0)})


def weights(given: Scores, **config: Any) -> Tensor:
    return Algorithm(Config(**config)).advantages(given)


def test_weights_of_a_group_have_mean_one_and_the_ratios_of_the_exponential():
    computed = weights(scores([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]), temperature=2.0, of="reward")
    assert computed.mean(1).tolist() == pytest.approx([1.0, 1.0])
    assert float(computed[0, 2] / computed[0, 1]) == pytest.approx(math.e)
    assert computed[1].tolist() == pytest.approx([1.0] * 3)


def test_the_exponential_is_the_papers():
    computed = weights(scores([[0.0, 1.0], [2.0, 0.5]]), temperature=0.5, of="reward", weights="exp")
    assert computed.flatten().tolist() == pytest.approx([math.exp(2 * r) for r in (0.0, 1.0, 2.0, 0.5)])


def test_advantages_make_the_temperature_independent_of_the_scale():
    small, large = ([[0.0, 0.1, 0.4], [0.2, 0.3, 0.2]] for _ in range(2))
    large = [[100 * r for r in row] for row in large]
    config: dict[str, Any] = {"std_delta": 0.0}
    assert torch.allclose(weights(scores(small), **config), weights(scores(large), **config), rtol=1e-4)
    assert not torch.allclose(weights(scores(small), of="reward"), weights(scores(large), of="reward"), rtol=1e-4)


@pytest.mark.parametrize("kind", ["softmax", "exp"])
def test_invalid_rows_weigh_nothing_and_the_others_as_if_they_were_alone(kind: Any):
    broken = scores([[0.0, 9.0, 1.0], [5.0, 5.0, 5.0]], [[True, False, True], [False] * 3])
    computed = weights(broken, weights=kind, of="reward")
    alone = weights(scores([[0.0, 1.0]]), weights=kind, of="reward")
    assert torch.equal(computed[0, [0, 2]], alone[0])
    assert computed[0, 1] == 0 and (computed[1] == 0).all()


def test_a_small_temperature_leaves_the_best():
    computed = group_softmax(torch.tensor([[1.0, 4.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool), 1e-3)
    assert computed.tolist() == [[0.0, 3.0, 0.0]]


def test_no_group_goes_free_since_all_weigh_something():
    assert (weights(scores([[2.0, 2.0, 2.0]])) == 1).all()
    with pytest.raises(ValidationError, match="zero_std_groups: drop finds no group of rwr"):
        Config(zero_std_groups="drop", kl_weight=0.1)


# --- one exact round on N(0, 1) data: with r = a x0 the best fit is the velocity of N(a / T, 1)


SLOPE, TEMPERATURE = 0.6, 1.5


def exponential(slope: float = SLOPE) -> Any:
    return lambda x0: (slope * x0 / TEMPERATURE).exp()


def test_one_round_makes_the_tilt():
    algorithm = Algorithm(Config(**GRID))
    assert in_errors(algorithm, tilted(SLOPE / TEMPERATURE), exponential()) < 3


def test_two_rounds_make_it_twice():
    shift = SLOPE / TEMPERATURE
    assert in_errors(Algorithm(Config(**GRID)), tilted(2 * shift), exponential(), mean=shift) < 3


@pytest.mark.parametrize(
    ("slope", "shift", "kl_weight"),
    [
        pytest.param(-SLOPE, SLOPE / TEMPERATURE, 0.0, id="sign flipped"),
        pytest.param(SLOPE, 1.5 * SLOPE / TEMPERATURE, 0.0, id="too far"),
        pytest.param(SLOPE, SLOPE / TEMPERATURE, 0.5, id="with an anchor"),
    ],
)
def test_and_nothing_else(slope: float, shift: float, kl_weight: float):
    algorithm = Algorithm(Config(kl_weight=kl_weight, **GRID))
    assert in_errors(algorithm, tilted(shift), exponential(slope), batches=15) > 6


@pytest.mark.parametrize(("kl_weight", "expected"), [(0.0, 3), (0.1, 6)])
def test_passes(kl_weight: float, expected: int, monkeypatch: pytest.MonkeyPatch):
    assert passes(tilted(0.0), Algorithm(Config(kl_weight=kl_weight, **GRID)), monkeypatch) == expected
