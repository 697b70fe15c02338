"""What a network's output implies: the clean latent and the noise. Every kernel and solver reads these two."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlalign.types import Level


@dataclass(frozen=True, slots=True)
class Prediction:
    """The implied ends of ``x = alpha * x0 + sigma * eps``."""

    x0: Tensor  # [B, *L]
    eps: Tensor  # [B, *L]

    @property
    def velocity(self) -> Tensor:
        """v = x1 - x0, the velocity of the flow path."""
        return self.eps - self.x0


def from_network(
    kind: Literal["velocity", "epsilon", "sample", "v_prediction"], output: Tensor, x: Tensor, level: Level
) -> Prediction:
    """Prediction at x, by what the network was trained to output.

    velocity      flow path, v ~ eps - x0                    x0 = x - sigma v              x1 = x + (1 - sigma) v
    epsilon       any path; singular where alpha = 0         x0 = (x - sigma eps)/alpha    x1 = eps
    sample        any path; singular where sigma = 0         x0 = output                   x1 = (x - alpha x0)/sigma
    v_prediction  alpha^2 + sigma^2 = 1 (arXiv 2202.00512)   x0 = alpha x - sigma v        x1 = sigma x + alpha v
    """
    alpha, sigma = level.alpha, level.sigma
    if kind == "velocity":
        return Prediction(x - sigma * output, x + (1 - sigma) * output)
    if kind == "epsilon":
        return Prediction((x - sigma * output) / alpha, output)
    if kind == "sample":
        return Prediction(output, (x - alpha * output) / sigma)
    return Prediction(alpha * x - sigma * output, sigma * x + alpha * output)
