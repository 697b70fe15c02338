"""What a penalty holds the policy to, how strongly, and in which samples: for every algorithm that has one.

    L = reward term + β mean_i g_i KL_i(π_θ || π_a)

    anchor   reference: θ_a is where the run began           average: θ_a <- d θ_a + (1 - d) θ after each step
    reset    θ_a <- θ after so many steps, or a step whose KL was too large              GARDO, arXiv 2512.24138
    target   β <- β (1 + rate clip(KL / target - 1, ±0.2)) after each step               arXiv 1909.08593
    gate     g_i = n / m for the m of n samples that are doubted most, 0 for the others  GARDO
             doubt = w_i(r) - mean_k w_i(r_k) > 0,  w_i = share of the batch's other samples that it beats

    zero_std_groups: drop    g_i = 0 in groups that teach nothing                         Flow-GRPO

r is the reward that is trained, r_k are others that the gate names, say two cheap models of taste: samples good by r
alone may have fooled it. g has mean 1, as in the published code, so that β keeps its meaning. ``kl`` is logged as
it counts, g KL, and that is what a reset and a target look at.

Metrics: ``kl_weight`` = β of the step, with a target · ``anchor_age`` = steps since the anchor was the policy, with
resets · ``advantage/gated`` = m / n, with a gate · ``advantage/lambda/<reward>`` of constraints.
"""

from dataclasses import replace
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlalign.algorithms.advantages import Multipliers, flat, winrate
from rlalign.algorithms.base import Algorithm
from rlalign.policy import Policy
from rlalign.settings import Settings
from rlalign.types import Scores

FURTHEST = 0.2  # error of the KL beyond which a target pulls no harder


class Anchor(Settings):
    """The key ``reference`` of preference objectives: where the weights are that they compare the policy with."""

    anchor: Literal["reference", "average"] = "reference"
    """What the policy is held to: reference is what the run began with, average the policy's running average."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """What is kept of that average in a step."""
    reset_every: int | None = Field(default=None, ge=1)
    """Steps after which the present policy becomes the reference; null: never."""

    @property
    def resets(self) -> bool:
        return self.reset_every is not None

    @property
    def moves(self) -> bool:
        """The anchor does not stay where the run began."""
        return self.anchor == "average" or self.resets

    @model_validator(mode="after")
    def _one_anchor(self) -> Self:
        if self.anchor == "average" and self.resets:
            raise ValueError("a reset is for anchor: reference; an average follows by itself")
        return self


class Anchored(Settings):
    """The key of preference objectives, whose reference need not stay where the run began."""

    reference: Anchor = Anchor()
    """What is compared with: what the run began with, that of some steps ago, or a running average."""


class Penalty(Anchor):
    """The key ``penalty`` of an algorithm: more about a penalty than its weight."""

    reset_above: float | None = Field(default=None, gt=0)
    """It does so, too, after a step whose metric `kl` is larger; null: never."""
    target: float | None = Field(default=None, gt=0)
    """Metric `kl` that kl_weight is adapted to, from its value at the start; null: it stays as it is."""
    target_rate: float = Field(default=0.1, gt=0, le=1)
    """How fast: a step changes kl_weight by a fifth of this at most."""
    gate: tuple[str, ...] = ()
    """Rewards with role train, of weight 0, that the others are compared with; then only doubted samples are held."""
    gate_share: float = Field(default=0.1, gt=0, le=1)
    """Share of the batch that is held at most, those that are doubted most."""

    @property
    def resets(self) -> bool:
        return self.reset_every is not None or self.reset_above is not None


class Penalised(Settings):
    """The keys of algorithms with a penalty."""

    kl_weight: float = Field(default=0.0, ge=0)
    """β of the penalty towards the reference; above 0 it costs one more pass of the net."""
    penalty: Penalty = Penalty()
    """What it holds on to, a target for its size, and for which samples it is (docs/concepts.md)."""
    zero_std_groups: Literal["drop", "keep"] = "keep"
    """Whether samples of a group that teaches nothing feel the penalty all the same."""

    @model_validator(mode="after")
    def _there_is_one(self) -> "Penalised":
        if self.penalty != Penalty() and self.kl_weight == 0:
            raise ValueError("penalty changes a penalty that has no weight: set kl_weight above 0, or leave it out")
        return self


def weight_of(algorithm: Algorithm) -> float:
    """β as it is now; 0 for algorithms without a penalty."""
    return algorithm.config.kl_weight if isinstance(algorithm.config, Penalised) else 0.0


def penalty_of(algorithm: Algorithm) -> Penalty:
    """Its settings; of a preference objective its anchor alone, and the defaults where there are no such keys."""
    config = algorithm.config
    if isinstance(config, Anchored):
        return Penalty.model_validate(config.reference.model_dump())
    return config.penalty if isinstance(config, Penalised) else Penalty()


# --- on the learner: where the anchor is, and how strongly it holds


class Regulariser:
    """Moves the anchor and the penalty's weight after each step; each rank of a learner has one, all alike."""

    def __init__(self, algorithm: Algorithm, policy: Policy) -> None:
        self.settings, self.algorithm, self.policy = penalty_of(algorithm), algorithm, policy
        self.age = 0  # steps since the anchor was the policy
        if self.settings.moves:
            policy.keep("anchor")
            policy.anchor = "anchor"

    def after_step(self, kl: float | None) -> dict[str, float]:
        """``kl`` is the step's metric, None where nothing was held. Answers what held in the step."""
        settings, metrics = self.settings, dict[str, float]()
        if settings.target:
            metrics["kl_weight"] = weight = weight_of(self.algorithm)
            if kl is not None:
                self._hold(adapted(weight, kl, settings.target, settings.target_rate))
        if settings.anchor == "average":
            self.policy.blend("anchor", settings.decay)
        elif settings.resets:
            metrics["anchor_age"] = float(self.age)
            self.age += 1
            if self.age == settings.reset_every or (settings.reset_above and (kl or 0.0) > settings.reset_above):
                self.policy.blend("anchor", 0.0)
                self.age = 0
        return metrics

    def state(self) -> dict[str, Any]:
        """For the checkpoint; the anchor itself is one of the policy's copies. Empty where nothing moves."""
        target, resets = self.settings.target is not None, self.settings.resets
        return {**({"kl_weight": weight_of(self.algorithm)} if target else {}), **({"age": self.age} if resets else {})}

    def load(self, state: dict[str, Any]) -> None:
        self.age = state.get("age", 0)
        if "kl_weight" in state:
            self._hold(state["kl_weight"])

    def _hold(self, weight: float) -> None:
        """The algorithm goes on with settings that differ in this alone."""
        vars(self.algorithm)["config"] = self.algorithm.config.model_copy(update={"kl_weight": weight})


def adapted(weight: float, kl: float, target: float, rate: float) -> float:
    """β (1 + rate clip(KL / target - 1, ±0.2))."""
    return weight * (1 + rate * min(max(kl / target - 1, -FURTHEST), FURTHEST))


def held(kl: Tensor, weights: Tensor | None) -> Tensor:
    """g KL [b], the penalty as it counts; the weights g of a micro-batch are ``sample.held``."""
    return kl if weights is None else kl * weights


# --- on the driver: which samples are held


@runtime_checkable
class Constrained(Protocol):
    """An algorithm that finds weights of rewards."""

    multipliers: Multipliers


def weighed(algorithm: Algorithm, scores: Scores) -> tuple[Tensor, dict[str, float]]:
    """Advantages [P, G] or, where g is not 1, the weights of both terms of the loss [P, G, 2]: (A, g); and metrics."""
    advantages, metrics, settings = algorithm.advantages(scores), dict[str, float](), penalty_of(algorithm)
    if isinstance(algorithm, Constrained):
        metrics |= {f"advantage/lambda/{name}": value for name, value in algorithm.multipliers.values.items()}
    weights = torch.ones_like(advantages)
    if settings.gate:
        weights = gated(doubt(scores, settings.gate), scores.valid, settings.gate_share).to(advantages)
        metrics["advantage/gated"] = float((weights > 0)[scores.valid].double().mean())
    if drops(algorithm):
        weights = weights * teaches(scores, advantages)
    told = settings.gate or drops(algorithm)
    return torch.stack([advantages, weights], 2) if told else advantages, metrics


def drops(algorithm: Algorithm) -> bool:
    """There is a penalty, and groups that teach nothing do not feel it."""
    config = algorithm.config
    return isinstance(config, Penalised) and config.kl_weight > 0 and config.zero_std_groups == "drop"


def teaches(scores: Scores, advantages: Tensor) -> Tensor:
    """[P, 1] bool: rewards of the group differ, or it has advantages all the same.

    Those come from weights of rewards that were moved, or from a comparison with more than the group.
    """
    return (~flat(scores.total, scores.valid) | (advantages != 0).any(1))[:, None]


def doubt(scores: Scores, others: tuple[str, ...]) -> Tensor:
    """w(r) - mean_k w(r_k) [P, G], win rates over the whole batch; ``others`` are the names of r_k."""
    training, valid = scores.training, scores.valid
    if unknown := set(others) - training.keys():
        raise ValueError(f"algorithm.penalty.gate: no reward with role train is called {sorted(unknown)[0]!r}")
    trained = {name: reward for name, reward in training.items() if name not in others}
    if not trained:
        raise ValueError("algorithm.penalty.gate names all rewards with role train: leave out those that are trained")
    own = _wins(replace(scores, rewards=trained).total, valid)
    theirs = torch.stack([_wins(training[name].values, valid) for name in others]).mean(0)
    return own - theirs


def gated(doubts: Tensor, valid: Tensor, share: float) -> Tensor:
    """g [P, G]: n / m for the m = floor(share n) largest of n valid doubts, or as many as are positive; else 0."""
    number = int(valid.sum())
    ranked = torch.where(valid, doubts, -torch.inf).flatten()
    first = ranked.argsort(descending=True, stable=True)[: int(share * number)]
    chosen = first[ranked[first] > 0]
    weights = torch.zeros_like(ranked)
    weights[chosen] = number / max(len(chosen), 1)
    return weights.reshape(doubts.shape)


def _wins(rewards: Tensor, valid: Tensor) -> Tensor:
    return winrate(rewards.double().reshape(1, -1), valid.reshape(1, -1)).reshape(rewards.shape)
