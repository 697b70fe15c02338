"""FID and KID of features, against what they are on paper."""

import pytest
import torch
from torch import Tensor

from rlalign.evaluation.distance import SUBSETS, distance, fid, kid


def gaussian(count: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """[count, D] with this very mean and covariance, not about them."""
    drawn = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    centred = drawn - drawn.mean(0)
    whitened = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / (count - 1))).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.sqrt().diag() @ vectors.T


def test_fid_is_the_formula():
    """Two Gaussians whose covariances do not commute."""
    means = torch.tensor([[0.0, 1.0, -1.0], [0.5, 1.0, 1.0]], dtype=torch.float64)
    one = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.2], [0.0, 0.2, 0.5]], dtype=torch.float64)
    two = torch.tensor([[1.0, -0.4, 0.1], [-0.4, 3.0, 0.0], [0.1, 0.0, 0.7]], dtype=torch.float64)
    half = root(one)
    expected = (means[0] - means[1]).square().sum() + (one + two - 2 * root(half @ two @ half)).trace()
    found = fid(gaussian(50, means[0], one, 0), gaussian(80, means[1], two, 1))
    assert found == pytest.approx(expected.item(), rel=1e-6)


def test_fid_along_one_axis():
    """(μ1 - μ2)² + (σ1 - σ2)² = 9 + 1."""
    one = gaussian(20, torch.zeros(1, dtype=torch.float64), torch.full((1, 1), 4.0, dtype=torch.float64), 0)
    two = gaussian(30, torch.full((1,), 3.0, dtype=torch.float64), torch.full((1, 1), 1.0, dtype=torch.float64), 1)
    assert fid(one, two) == pytest.approx(10, rel=1e-6)
    assert fid(one, one) == pytest.approx(0, abs=1e-5)


def brute(x: Tensor, y: Tensor) -> float:
    """The unbiased estimator, pair by pair."""
    n, d = x.shape

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / d + 1) ** 3

    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = sum(k(x[i], x[j]) + k(y[i], y[j]) for i, j in pairs) / (n * (n - 1))
    return within - 2 * sum(k(a, b) for a in x for b in y) / n**2


def test_kid_is_the_unbiased_estimator():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 3, generator=generator, dtype=torch.float64) + shift for shift in (0.0, 0.5))
    mean, spread = kid(x, y, subset=6)  # every subset is the whole set
    assert mean == pytest.approx(brute(x, y), rel=1e-9)
    assert spread == pytest.approx(0, abs=1e-9)


def test_kid_of_the_same_distribution_is_0_on_average_however_few_there_are():
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor([kid(*torch.randn(2, 5, 4, generator=generator), subset=5)[0] for _ in range(400)])
    assert abs(found.mean()) < 3 * found.std() / 20  # sqrt(400)
    assert found.min() < 0 < found.max()


def test_subsets_are_drawn_by_address():
    x, y = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    one, again, other = distance(x, y), distance(x, y), distance(x, y, seed=1)
    assert one == again and one.kid != other.kid and one.fid == other.fid
    assert torch.equal(torch.get_rng_state(), state)
    assert one.kid_std > 0 and SUBSETS == 50


def test_three_pictures_tell_nothing():
    with pytest.raises(ValueError, match="4 pictures of each kind or more, and there are 3"):
        distance(torch.zeros(3, 2), torch.zeros(9, 2))
