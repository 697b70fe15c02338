"""Rewards [P, G] -> advantages [P, G]: pure functions. Only entries where ``valid`` count; the others get 0.

    center           A = r - mean_g
    loo              A = r_i - mean_{j != i} r_j = G / (G - 1) (r_i - mean_g)    RLOO, arXiv 2402.14740
    group_std        A = (r - mean_g) / std_g                                    GRPO, arXiv 2402.03300; DanceGRPO
    global_std       A = (r - mean_g) / std of all rewards                       Flow-GRPO, arXiv 2505.05470; NFT
    batch            A = (r - mean) / std of all rewards                         DDPO without tracker; DanceGRPO
    advantage_aggr   A = sum_k w_k (r_k - mean_g) / std_g, per reward k          MixGRPO, arXiv 2507.21802
    gdpo             A = c / std(c), c as advantage_aggr                         GDPO, arXiv 2601.05242

Before that rewards may become win rates within their group. After it good advantages may be multiplied by how far the
sample is from its like, and all but some advantages of a group may become 0:

    winrate          r_i <- mean_{j != i} 1[r_i > r_j], a tie is half a win      Pref-GRPO, arXiv 2508.20751
    diversity        A_i <- A_i d_i / mean_g d where A_i > 0                     GARDO, arXiv 2512.24138
                     d_i = distance to the nearest other sample of the group
    top_bottom       the K highest and the K lowest advantages stay              DanceGRPO's best of n
    pareto           samples stay that no other beats in every reward            Parrot, arXiv 2401.05675

A group whose rewards are all equal, or of which fewer than two are valid, gets exactly 0: it says nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.base import Stateless
from rlalign.settings import Settings
from rlalign.types import Scores, State

AdvantageKind = Literal["center", "loo", "group_std", "global_std", "batch", "gdpo", "advantage_aggr"]


@dataclass(frozen=True, slots=True)
class Std:
    """How a standard deviation is estimated, and kept away from 0 where something is divided by it."""

    unbiased: bool = False  # divide the squares by n - 1 (verl-omni, DanceGRPO, MixGRPO) or by n (all others)
    delta: float = 1e-4
    floor: float = 0.0

    def guarded(self, std: Tensor) -> Tensor:
        """max(std, floor) + delta."""
        return std.clamp(min=self.floor) + self.delta


class AdvantageSettings(Settings):
    """The keys of group-relative algorithms that turn rewards into advantages; their ``Config`` takes them over."""

    advantage: AdvantageKind = "global_std"
    """What is taken off a reward and what it is divided by; the table is in ``rlalign/algorithms/advantages.py``."""
    std_estimator: Literal["population", "unbiased"] = "population"
    """population divides the squares by n, unbiased by n - 1."""
    std_delta: float = Field(default=1e-4, ge=0)
    """Added to every std that something is divided by."""
    std_floor: float = Field(default=0.0, ge=0)
    """Lower bound of such a std: under gdpo and advantage_aggr an almost constant reward is amplified without it."""
    trim: float = Field(default=0.0, ge=0, lt=1)
    """The lowest share of a group's rewards that its mean and std leave out (MixGRPO); gdpo, loo and batch use all."""
    adv_clip: float | None = Field(default=5.0, gt=0)
    """Advantages are clamped to +-adv_clip; null: not at all."""
    rewards_as: Literal["values", "winrate"] = "values"
    """winrate: each reward counts as the share of its group's other samples that it beats, whatever the margin."""
    diversity: str | None = None
    """Good advantages are multiplied by the sample's distance to the nearest of its group, over their mean: pixels, or
    the name of a reward with role train (of weight 0) that measures it in better features."""
    select: Literal["all", "top_bottom", "pareto"] = "all"
    """Samples of a group that keep their advantage: all, the best and the worst, or those on the Pareto front."""
    select_count: int = Field(default=4, ge=1)
    """How many best and how many worst top_bottom selects."""
    constraints: dict[str, float] = Field(default_factory=dict[str, float])
    """Rewards by name that are to reach a mean and no more; their weights are found in training."""
    constraint_rate: float = Field(default=0.1, gt=0)
    """What such a weight grows by a step where the mean is 1 short of its bound."""


def group_relative(scores: Scores, settings: AdvantageSettings) -> Tensor:
    """[P, G] float32: the advantages that ``settings`` ask for."""
    rewards, valid, trim = scores.total.double(), scores.valid, settings.trim
    std = Std(settings.std_estimator == "unbiased", settings.std_delta, settings.std_floor)
    parts = [reward.values.double() for reward in scores.training.values()]
    weights = [reward.weight for reward in scores.training.values()]
    if settings.rewards_as == "winrate":
        parts = [winrate(part, valid) for part in parts]
        rewards = torch.stack([w * part for w, part in zip(weights, parts, strict=True)]).sum(0)
    advantages = {
        "center": lambda: center(rewards, valid, trim),
        "loo": lambda: loo(rewards, valid),
        "group_std": lambda: group_std(rewards, valid, std, trim),
        "global_std": lambda: global_std(rewards, valid, std, trim),
        "batch": lambda: batch(rewards, valid, std),
        "gdpo": lambda: gdpo(parts, weights, valid, std),
        "advantage_aggr": lambda: advantage_aggr(parts, weights, valid, std, trim),
    }[settings.advantage]()
    if settings.diversity is not None:
        advantages = diverse(advantages, nearest_of(scores, settings.diversity), valid)
    if settings.select == "top_bottom":
        advantages = torch.where(extremes(advantages, valid, settings.select_count), advantages, 0)
    if settings.select == "pareto":
        signed = [part if weight > 0 else -part for part, weight in zip(parts, weights, strict=True) if weight]
        advantages = torch.where(pareto_front(signed, valid), advantages, 0)
    bound = torch.inf if settings.adv_clip is None else settings.adv_clip
    return advantages.clamp(-bound, bound).float()


class Multipliers:
    """Rewards that are to reach a bound and no more, by dual ascent (PPO-Lagrangian, Ray et al. 2019).

        maximise Σ w_j r_j  with  mean r_k ≥ d_k:    λ_k <- max(0, λ_k + η (d_k - mean r_k)),  the weight of r_k is λ_k

    all weights divided by 1 + Σ λ, so that a step does not grow with λ.
    """

    def __init__(self, bounds: Mapping[str, float], rate: float) -> None:
        self.bounds, self.rate = bounds, rate
        self.values = dict.fromkeys(bounds, 0.0)

    def weighted(self, scores: Scores) -> Scores:
        """Moves λ by these rewards, then gives them their new weights."""
        if unknown := self.bounds.keys() - scores.training.keys():
            raise ValueError(f"algorithm.constraints: no reward with role train is called {sorted(unknown)[0]!r}")
        for name, bound in self.bounds.items():
            seen = scores.training[name].values[scores.training[name].valid].double()
            if len(seen):
                self.values[name] = max(0.0, self.values[name] + self.rate * (bound - float(seen.mean())))
        total = 1 + sum(self.values.values())
        training = {
            name: replace(reward, weight=self.values.get(name, reward.weight) / total)
            for name, reward in scores.training.items()
        }
        return replace(scores, rewards={**scores.rewards, **training})


class GroupRelative(Stateless):
    """Of an algorithm with group-relative advantages: it makes them, and remembers the weights of constraints."""

    def __init__(self, config: AdvantageSettings) -> None:
        self.multipliers = Multipliers(config.constraints, config.constraint_rate)
        self._made_by = config

    def advantages(self, scores: Scores) -> Tensor:
        return group_relative(self.multipliers.weighted(scores), self._made_by)

    def state_dict(self) -> State:
        return State(values={"multipliers": dict(self.multipliers.values)} if self.multipliers.bounds else {})

    def load_state_dict(self, state: State) -> None:
        held = state.values.get("multipliers", {})
        self.multipliers.values |= {name: held[name] for name in self.multipliers.bounds if name in held}


def moments(values: Tensor, counted: Tensor, dims: list[int], unbiased: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and std of the counted entries over ``dims``, which are kept; the std of a single entry is 0."""
    number = counted.sum(dims, keepdim=True)
    mean = torch.where(counted, values, 0).sum(dims, keepdim=True) / number.clamp(min=1)
    squares = torch.where(counted, values - mean, 0).square().sum(dims, keepdim=True)
    return mean, (squares / (number - int(unbiased)).clamp(min=1)).sqrt()


def flat(rewards: Tensor, valid: Tensor) -> Tensor:
    """[P] bool: the group has no two valid rewards that differ, hence no signal."""
    highest = torch.where(valid, rewards, -torch.inf).amax(1)
    return highest <= torch.where(valid, rewards, torch.inf).amin(1)


def winrate(rewards: Tensor, valid: Tensor) -> Tensor:
    """[P, G] in [0, 1]: mean over the group's other valid samples of 1 for a win, ½ for a tie; 0 where invalid."""
    wins = (rewards[:, :, None] - rewards[:, None, :]).sign() / 2 + 0.5
    others = valid[:, :, None] & valid[:, None, :] & ~torch.eye(rewards.shape[1], dtype=torch.bool)
    return torch.where(others, wins, 0).sum(2) / others.sum(2).clamp(min=1)


def nearest_of(scores: Scores, feature: str) -> Tensor:
    """d [P, G]: by pixels, or as a reward measures it."""
    if feature == "pixels":
        assert scores.nearest is not None, "scores without pixel distances"
        return scores.nearest.double()
    if feature not in scores.training:
        raise ValueError(f"algorithm.diversity: no reward with role train is called {feature!r}, and it is not pixels")
    return scores.training[feature].values.double()


def diverse(advantages: Tensor, nearest: Tensor, valid: Tensor) -> Tensor:
    """A d / mean_g d where A > 0; a group whose samples are all alike stays as it is."""
    mean, _ = moments(nearest, valid, [1])
    return torch.where((advantages > 0) & (mean > 0), _divided(advantages * nearest, mean), advantages)


def extremes(values: Tensor, valid: Tensor, count: int) -> Tensor:
    """[P, G] bool: the ``count`` highest and the ``count`` lowest valid values of each group."""
    best = torch.where(valid, values, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    worst = torch.where(valid, values, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return valid & ((best < count) | (worst < count))


def pareto_front(rewards: Sequence[Tensor], valid: Tensor) -> Tensor:
    """[P, G] bool: valid samples that none of their group is at least as good as in all rewards and better in one."""
    stacked = torch.stack([*rewards])  # [R, P, G]
    mine, theirs = stacked[..., :, None], stacked[..., None, :]
    dominated = (theirs >= mine).all(0) & (theirs > mine).any(0) & valid[:, None, :]
    return valid & ~dominated.any(2)


def lowest(rewards: Tensor, valid: Tensor, share: float) -> Tensor:
    """[P, G] bool: the floor(share * n) lowest of the n valid rewards of a group."""
    rank = torch.where(valid, rewards, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return rank < (share * valid.sum(1, keepdim=True).double()).floor()


def center(rewards: Tensor, valid: Tensor, trim: float = 0.0) -> Tensor:
    """A = r - mean_g; the mean is over what ``trim`` leaves of the group."""
    mean, _ = moments(rewards, valid & ~lowest(rewards, valid, trim), [1])
    return torch.where(valid & ~flat(rewards, valid)[:, None], rewards - mean, 0)


def loo(rewards: Tensor, valid: Tensor) -> Tensor:
    """A = r_i - mean_{j != i} r_j = n / (n - 1) (r_i - mean_g): the policy gradient without bias."""
    number = valid.sum(1, keepdim=True)
    return center(rewards, valid) * number / (number - 1).clamp(min=1)


def group_std(rewards: Tensor, valid: Tensor, std: Std, trim: float = 0.0) -> Tensor:
    """A = (r - mean_g) / std_g."""
    _, spread = moments(rewards, valid & ~lowest(rewards, valid, trim), [1], std.unbiased)
    return _divided(center(rewards, valid, trim), std.guarded(spread))


def global_std(rewards: Tensor, valid: Tensor, std: Std, trim: float = 0.0) -> Tensor:
    """A = (r - mean_g) / std of all rewards of the batch."""
    _, spread = moments(rewards, valid, [0, 1], std.unbiased)
    return _divided(center(rewards, valid, trim), std.guarded(spread))


def batch(rewards: Tensor, valid: Tensor, std: Std) -> Tensor:
    """A = (r - mean) / std, both of all rewards of the batch as if they were one group."""
    return group_std(rewards.reshape(1, -1), valid.reshape(1, -1), std).reshape(rewards.shape)


def advantage_aggr(
    rewards: Sequence[Tensor], weights: Sequence[float], valid: Tensor, std: Std, trim: float = 0.0
) -> Tensor:
    """A = sum_k w_k (r_k - mean_g(r_k)) / std_g(r_k): every reward has its say, whatever its scale."""
    parts = [w * group_std(r, valid, std, trim) for r, w in zip(rewards, weights, strict=True)]
    return torch.stack(parts).sum(0)


def gdpo(rewards: Sequence[Tensor], weights: Sequence[float], valid: Tensor, std: Std) -> Tensor:
    """A = (c - mean(c)) / std(c), c = sum_k w_k (r_k - mean_g) / std_g; mean(c) is 0, since every group is centred."""
    combined = advantage_aggr(rewards, weights, valid, std)
    _, spread = moments(combined, valid, [0, 1], std.unbiased)
    return _divided(combined, std.guarded(spread))


def _divided(deviation: Tensor, std: Tensor) -> Tensor:
    """0 / 0 = 0: with delta = floor = 0 a group without spread has no deviation either."""
    return torch.where(deviation == 0, 0, deviation / std)
