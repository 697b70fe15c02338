"""RAFT: the model is fine-tuned on the best of each group (arXiv 2304.06767, there for language models).

    L  = mean over samples and times of  1[chosen] w(t) mean (v_θ - u)² + β w_kl(t) mean (v_θ - v_ref)²,      u = ε - x0

What it is fitted to is the law of the best of G, p G F(r)^(G - 1), at a distance log G - (G - 1) / G from p. Robust and
slow; diversity shrinks with every round. ``advantages`` are 1 for the chosen and 0 for the rest.

Metrics: ``policy_loss`` before the penalty · ``error`` = w(t) mean (v_θ - u)² of all rows that are looked at · ``kl`` =
w_kl(t) mean (v_θ - v_ref)² when its weight is positive.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import flat
from rlalign.algorithms.base import Loss, Needs, SampleWith, Stateless
from rlalign.algorithms.forward import ForwardSettings, regression
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Scores, Trajectory


class Config(ForwardSettings):
    """The algorithm block with ``name: raft``; keys of advantages have no effect."""

    name: Literal["raft"] = "raft"
    """This algorithm."""
    keep: int = Field(default=1, ge=1)
    """How many of a group are chosen; others that score the same as the last of them are chosen too."""


def best(rewards: Tensor, valid: Tensor, keep: int = 1) -> Tensor:
    """[P, G] bool: no worse than the ``keep``-th best valid reward of the group; none of a group without spread."""
    ranked = torch.where(valid, rewards, -torch.inf)
    bar = ranked.topk(min(keep, rewards.shape[1]), 1).values[:, -1:]
    return valid & (rewards >= bar) & ~flat(rewards, valid)[:, None]


class Algorithm(Stateless):
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs = Needs(trajectory=False, silent_zero=True)

    def advantages(self, scores: Scores) -> Tensor:
        return best(scores.total, scores.valid, self.config.keep).float()

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        yield from regression(policy, sample, advantages, noise, self.config)


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""
