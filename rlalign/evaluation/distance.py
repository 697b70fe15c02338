"""How far two sets of pictures are apart, as distributions of features: FID and KID, by torchmetrics.

    FID = |μ_1 - μ_2|² + tr(Σ_1 + Σ_2 - 2 (Σ_1 Σ_2)^½)                              arXiv 1706.08500
    KID = E k(x, x') + E k(y, y') - 2 E k(x, y),   k(x, y) = (x·y / D + 1)³         arXiv 1801.01401, unbiased

FID of few pictures is too large, and the more so the fewer they are; KID is not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlalign.mdp.noise import Noise

SUBSETS, MOST_IN_SUBSET = 50, 1000
ENOUGH_FOR_FID = 5000


@dataclass(frozen=True, slots=True)
class Distance:
    fid: float
    kid: float  # mean over subsets
    kid_std: float  # between subsets


def distance(reference: Tensor, features: Tensor, seed: int = 0) -> Distance:
    """Of two sets of features [N, D] and [M, D]; ValueError where there are too few to tell."""
    fewest = min(len(reference), len(features))
    require_enough(len(reference), len(features))
    mean, std = kid(reference, features, min(MOST_IN_SUBSET, fewest // 2), seed)
    return Distance(fid(reference, features), mean, std)


def require_enough(*numbers: int) -> None:
    """ValueError where there are too few pictures of a kind."""
    if min(numbers) < 4:
        raise ValueError(f"FID and KID need 4 pictures of each kind or more, and there are {min(numbers)}")


def fid(reference: Tensor, features: Tensor) -> float:
    """Between the Gaussians with their means and covariances, in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    told = nn.Identity()  # features come in, where the library would take pictures
    told.register_buffer("num_features", torch.tensor(features.shape[1]))
    metric = FrechetInceptionDistance(feature=told)
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return float(metric.compute())


def kid(reference: Tensor, features: Tensor, subset: int, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over ``SUBSETS`` subsets of so many features of each, drawn by address."""
    from torchmetrics.image.kid import poly_mmd

    noise = Noise(seed)

    def drawn(rows: Tensor, number: int, which: int) -> Tensor:
        order = noise.permutation("evaluation/kid", (number, which, 0), len(rows))
        return rows[order[:subset]].double()

    found = [poly_mmd(drawn(reference, n, 0), drawn(features, n, 1)) for n in range(SUBSETS)]
    scores = torch.stack(found)
    return float(scores.mean()), float(scores.std(correction=0))
