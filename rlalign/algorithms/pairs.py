"""What preference objectives share: which samples make a pair, the loss of a pair, log-ratios to the reference.

A row's mark takes the place of its advantage: the winner of a group's pair n has +n, its loser -n, all others 0. With
implicit rewards s of the rows a pair has the margin h = s_winner - s_loser. Both members carry the whole loss of their
pair, rows outside pairs carry 0: the mean over rows in pairs is the mean over pairs.

    sigmoid   -log σ(h)                                     DPO, arXiv 2305.18290
    cdpo      -(1 - q) log σ(h) - q log σ(-h)               labels wrong with probability q
    hinge     max(0, 1 - h)                                 SLiC, arXiv 2305.10425
    ipo       (h / β - 1 / (2β))²                           IPO, arXiv 2310.12036; h / β is the log-ratio itself
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlalign.algorithms.advantages import AdvantageSettings, group_relative
from rlalign.algorithms.base import Loss, UpdateSettings
from rlalign.algorithms.forward import group_index
from rlalign.algorithms.losses import fixed_step
from rlalign.algorithms.regularise import Anchored
from rlalign.mdp.transition import Gaussian, Reduction
from rlalign.policy import Policy
from rlalign.types import Scores, Trajectory

Pairing = Literal["best_worst", "ranked"]
PairLoss = Literal["sigmoid", "cdpo", "hinge", "ipo"]


class PairSettings(AdvantageSettings, Anchored, UpdateSettings):
    """The keys of preference objectives that say which samples make a pair."""

    pairs: Pairing = "best_worst"
    """best_worst: one pair a group; ranked: also the second best with the second worst, and so on."""
    unanimous: bool = False
    """Only pairs whose winner is at least as good in every training reward."""


def marks_of(scores: Scores, settings: PairSettings) -> Tensor:
    """[P, G] float32: pairs by advantage, so that several rewards are weighed as everywhere else."""
    values = group_relative(scores, settings)
    counted = scores.valid if settings.select == "all" else scores.valid & (values != 0)
    parts = [reward.values * reward.weight for reward in scores.training.values()] if settings.unanimous else []
    return marks(values, counted, settings.pairs, parts)


def marks(values: Tensor, valid: Tensor, pairing: Pairing, unanimous: Sequence[Tensor] = ()) -> Tensor:
    """[P, G]: ±1 for a group's best and worst; ``ranked``: also ±2 for the second best and second worst, and so on.

    A pair of equal values says nothing and is left out, hence a group whose valid values all tie; so is one whose loser
    has more of any of ``unanimous``.
    """
    ordered = torch.where(valid, values, -torch.inf).sort(dim=1, descending=True, stable=True)
    place = ordered.indices.argsort(1)  # 0 for the best; behind all valid ones for the others
    opposite = valid.sum(1, keepdim=True) - 1 - place
    partner = ordered.indices.gather(1, opposite.clamp(min=0))
    side = (values - values.gather(1, partner)).sign()
    pair = torch.minimum(place, opposite) + 1
    paired = valid & (side != 0) & ((pair == 1) | (pairing == "ranked"))
    for part in unanimous:
        paired &= side * (part - part.gather(1, partner)) >= 0
    return torch.where(paired, pair * side, 0)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Which rows of a micro-batch belong together."""

    sign: Tensor  # [b]   1 for winners, -1 for losers, 0 for rows in no pair
    partner: Tensor  # [b] int64   the other member, the row itself if it is in no pair

    @staticmethod
    def of(group: Tensor, marks: Tensor) -> "Pairs":
        """From the rows' groups [b] and marks [b]; a row whose partner is absent is in no pair."""
        meets = (group[:, None] == group) & (marks[:, None] == -marks) & (marks != 0)
        own = torch.arange(len(marks), device=marks.device)
        found = meets.any(1)
        return Pairs(marks.sign() * found, torch.where(found, meets.int().argmax(1), own))

    @property
    def inside(self) -> Tensor:
        return self.sign.abs()

    def margin(self, implicit: Tensor) -> Tensor:
        """h = s_winner - s_loser [b], the same for both members; 0 outside pairs."""
        return self.sign * (implicit - implicit[self.partner])

    def winner(self, values: Tensor) -> Tensor:
        """[b]: the value of each row's winner; 0 outside pairs."""
        return torch.where(self.sign > 0, values, values[self.partner]) * self.inside

    def loser(self, values: Tensor) -> Tensor:
        return torch.where(self.sign < 0, values, values[self.partner]) * self.inside


def pairs_of(sample: Trajectory, marks: Tensor) -> Pairs:
    return Pairs.of(group_index(sample), marks)


def pair_loss(h: Tensor, form: PairLoss, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """The table above; q = label_smoothing is of ``cdpo`` alone."""
    if form == "ipo":
        return (h / beta - 1 / (2 * beta)).square()
    if form == "hinge":
        return (1 - h).relu()
    q = label_smoothing if form == "cdpo" else 0.0
    return (1 - q) * softplus(-h) + q * softplus(h)


def margin_metrics(pairs: Pairs, h: Tensor, implicit: Tensor) -> dict[str, Tensor]:
    """``accuracy`` = share of pairs with h > 0, ``margin`` = h, and the mean implicit reward by side."""
    means = {
        "accuracy": (h > 0).to(h),
        "margin": h,
        "winner_gain": pairs.winner(implicit),
        "loser_gain": pairs.loser(implicit),
    }
    return {name: value.detach() for name, value in means.items()}


# --- log-ratios of kept steps


def log_ratio(step: Gaussian, reference: Gaussian, x: Tensor, reduction: Reduction) -> Tensor:
    """log N(x; μ, c) - log N(x; μ_ref, c) = (μ - μ_ref)(x - (μ + μ_ref)/2) / c², reduced to [b]; c is the same of both.

    As one difference: of two log-probs it would lose all digits that they share.
    """
    middle = (step.mean + reference.mean) / 2
    rows = ((step.mean - reference.mean) * (x.detach() - middle) / step.std.square()).flatten(1)
    return rows.sum(1) if reduction == "sum" else rows.mean(1)


def within(log_ratios: Tensor, clip_range: float | None) -> tuple[Tensor, Tensor]:
    """ρ held within log(1 ± ε), D3PO's and SPO's bound of the ratio to the reference, and where it was outside."""
    if clip_range is None:
        return log_ratios, torch.zeros_like(log_ratios)
    low, high = math.log1p(-clip_range), math.log1p(clip_range)
    return log_ratios.clamp(low, high), ((log_ratios < low) | (log_ratios > high)).to(log_ratios)


LossOfRatios = Callable[[Tensor, Tensor], Loss]
"""Of log-ratios [b, K] to the reference, and to the weights that sampled, the latter as the run reduces log-probs."""


def whole_trajectory(policy: Policy, sample: Trajectory, reduction: Reduction, loss_of: LossOfRatios) -> Iterator[Loss]:
    """A loss of all kept steps at once, L(ρ_1 .. ρ_K), with the graph of one step at a time.

    Its gradient is Σ_k ∂L/∂ρ_k ∇ρ_k. The slopes ∂L/∂ρ_k are numbers, known after a first pass without graph; then
    each step yields L / K + ∂L/∂ρ_k (ρ_k - ρ_k detached).
    """
    slots = range(sample.num_kept)
    references = [fixed_step(policy, "reference", sample, slot).gaussian for slot in slots]
    with torch.no_grad():
        steps = [policy.replay(sample, slot).gaussian for slot in slots]
        nexts = sample.x_next.unbind(1)
        ratios = [log_ratio(*three, reduction) for three in zip(steps, references, nexts, strict=True)]
        log_probs = [policy.log_prob(step, x) for step, x in zip(steps, nexts, strict=True)]
    rho = torch.stack(ratios, 1).requires_grad_()
    whole = loss_of(rho, torch.stack(log_probs, 1) - sample.log_probs.detach())
    (slopes,) = torch.autograd.grad(whole.rows.sum(), rho)
    for slot in slots:
        ratio = log_ratio(policy.replay(sample, slot).gaussian, references[slot], nexts[slot], reduction)
        rows = whole.rows.detach() / len(slots) + slopes[:, slot] * (ratio - ratio.detach())
        yield Loss(rows, whole.means, whole.maxima)
