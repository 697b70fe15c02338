"""Which prompts a step draws when they have weights: a pure function of (seed, step), with no state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from rlalign.mdp.noise import Noise
from rlalign.types import Prompt

Curve = float | Sequence[tuple[int, float]]
"""A weight, or its value at some steps, straight lines between them and flat outside."""


@dataclass(frozen=True, slots=True)
class Weights:
    """How often prompts are drawn: each one's own number, times that of its tag at the step."""

    own: tuple[float, ...] = ()
    tags: Mapping[str, Curve] = field(default_factory=dict[str, Curve])  # by metadata["tag"]; 1 for other tags

    @property
    def uniform(self) -> bool:
        return not self.tags and all(weight == 1 for weight in self.own)

    def at(self, step: int, prompts: Sequence[Prompt]) -> NDArray[np.float64]:
        """[len(prompts)]"""
        of_tag = {tag: value_at(curve, step) for tag, curve in self.tags.items()}
        tags = [of_tag.get(str(prompt.metadata.get("tag")), 1.0) for prompt in prompts]
        return np.array(self.own or [1.0] * len(prompts)) * np.array(tags)

    def tagged(self, tags: Mapping[str, Curve], prompts: Sequence[Prompt]) -> "Weights":
        """With weights for tags. ValueError where a tag is unknown or nothing is left to draw at some step."""
        known = sorted({str(prompt.metadata["tag"]) for prompt in prompts if "tag" in prompt.metadata})
        for tag in tags:
            if tag not in known:
                raise ValueError(
                    f"prompts.weights names the tag {tag!r}, which no training prompt has; "
                    + (f"they have {', '.join(known)}" if known else 'write {"text": ..., "metadata": {"tag": ...}}')
                )
        weights = replace(self, tags=tags)
        knots = sorted(
            {0, *(step for curve in tags.values() if not isinstance(curve, int | float) for step, _ in curve)}
        )
        # Lines that are nowhere negative vanish between two knots only where they vanish at both.
        for step in knots:
            if not weights.uniform and weights.at(step, prompts).sum() == 0:
                raise ValueError(f"the weights of all training prompts are 0 at step {step}, so that nothing is drawn")
        return weights


def value_at(curve: Curve, step: int) -> float:
    if isinstance(curve, int | float):
        return curve
    steps, values = zip(*curve, strict=True)
    return float(np.interp(step, steps, values))


def chosen(weights: NDArray[np.float64], noise: Noise, step: int, count: int) -> list[int]:
    """The places of a step's ``count`` prompts: systematic sampling over a fresh order.

    Place i is expected count * weights[i] / sum(weights) times, exactly, and comes more than once only where that is
    more than 1.
    """
    order = noise.permutation("weighted prompts", (step, 0, 0), len(weights)).numpy()
    ends = weights[order].cumsum()
    start = noise.uniform("weighted prompts", torch.tensor([[step, 0, 0]]), 0, (1,), torch.float64).item()
    points = (start + np.arange(count)) / count * ends[-1]
    last = np.flatnonzero(weights[order])[-1]  # rounding may put the last point at the very end
    return order[np.minimum(np.searchsorted(ends, points, side="right"), last)].tolist()
