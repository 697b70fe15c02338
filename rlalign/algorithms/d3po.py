"""D3PO: preference optimisation on the steps of the chain itself (arXiv 2311.13231, eq. 15).

    ρ_k = log π_θ(y_{k+1} | y_k, c) - log π_ref(y_{k+1} | y_k, c),  kept within log(1 ± ε)
    step        L = mean over rows and kept steps k of  -w_k log σ(β [ρ_k^w - ρ_k^l]),    w_k = γ^k / mean_j γ^j
    trajectory  L = mean over rows of  -log σ(β Σ_k γ^k [ρ_k^w - ρ_k^l])

By step every step gets the verdict on the picture, as in the paper; γ < 1 gives early steps more weight. By trajectory
it is DPO on the chain, whose optimum is the KL-regularised one; with γ < 1 the objective of arXiv 2402.08265. Samples
of a group should start from the same noise, or the reward differs for a reason that no step can explain. Log-ratios
are reduced as the run's log-probs are. Both members of a pair carry its loss, rows in no pair carry 0.

Metrics: ``policy_loss`` over rows in pairs · ``accuracy`` = share of pairs with h > 0 · ``margin`` = h = β [..] ·
``winner_gain`` and ``loser_gain`` = the two halves of h · ``clip_fraction`` = share of ρ_k outside log(1 ± ε), whose
gradient is cut.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith
from rlalign.algorithms.losses import fixed_step
from rlalign.algorithms.pairs import (
    Pairs,
    PairSettings,
    log_ratio,
    margin_metrics,
    marks_of,
    pair_loss,
    pairs_of,
    whole_trajectory,
    within,
)
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Scores, Trajectory


class Config(PairSettings):
    """The algorithm block with ``name: d3po``."""

    name: Literal["d3po"] = "d3po"
    """This algorithm."""
    beta: float = Field(default=0.1, gt=0)
    """β of the log-ratios."""
    level: Literal["step", "trajectory"] = "step"
    """One sigmoid a step, or one of the sum over steps."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """γ: below 1 early steps weigh more."""
    clip_range: float | None = Field(default=0.1, gt=0, lt=1)
    """ε of the ratio to the reference in each step; null: no bound."""


class Algorithm(GroupRelative):
    needs = Needs(trajectory=True, silent_zero=True, whole_groups=True)
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def advantages(self, scores: Scores) -> Tensor:
        return marks_of(self.multipliers.weighted(scores), self.config)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        pairs, reduction = pairs_of(sample, advantages), policy.settings.logprob_reduction
        discounts = (self.config.discount**sample.steps).to(advantages)  # [b, K]
        if self.config.level == "trajectory":
            yield from whole_trajectory(policy, sample, reduction, lambda rho, _: self._loss(pairs, rho, discounts))
            return
        weights = discounts / discounts.mean(1, keepdim=True)
        for slot, x_next in enumerate(sample.x_next.unbind(1)):
            reference = fixed_step(policy, "reference", sample, slot).gaussian
            rho = log_ratio(policy.replay(sample, slot).gaussian, reference, x_next, reduction)
            loss = self._loss(pairs, rho[:, None], torch.ones_like(rho)[:, None], weights[:, slot])
            yield Loss(loss.rows / sample.num_kept, loss.means)

    def _loss(self, pairs: Pairs, rho: Tensor, discounts: Tensor, weight: Tensor | float = 1.0) -> Loss:
        """-weight log σ(h), h = β Σ_k discounts_k [ρ_k^w - ρ_k^l]; ρ and discounts [b, K]."""
        kept, clipped = within(rho, self.config.clip_range)
        implicit = self.config.beta * (discounts * kept).sum(1)
        h = pairs.margin(implicit)
        rows = weight * pair_loss(h, "sigmoid", self.config.beta) * pairs.inside
        means = {"policy_loss": rows.detach(), "clip_fraction": clipped.mean(1)}
        return Loss(rows, {**means, **margin_metrics(pairs, h, implicit)})


_DDIM: dict[str, Any] = {"kernel": "ddim", "noise_level": 1.0, "solver": "euler", "init_noise": "shared"}

OVERLAY: dict[str, Any] = {"rollout": {**_DDIM, "window": None}, "optimizer": {"eps": 1e-15}}
"""All steps but the last stochastic and trained; both members of a pair start from the same noise."""


PRESETS: dict[str, dict[str, Any]] = {
    "dense_reward": {"algorithm": {"name": "d3po", "level": "trajectory", "discount": 0.9}},
    "d3po_sd15": {
        "rollout": {
            **{"size": (512, 512), "prompts_per_step": 20, "samples_per_prompt": 2, "num_steps": 20},
            **{"guidance_scale": 5.0, "window": None, **_DDIM},
        },
        "algorithm": {"name": "d3po", "beta": 0.1, "clip_range": 0.1},
        "optimizer": {"lr": 3e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": None,
        "model": {"lora": {"rank": 4, "alpha": 4}},
    },
}
"""dense_reward is the objective of arXiv 2402.08265, which draws 3 steps with probabilities ~ γ^k; here all kept steps
count. d3po_sd15 is the published code, which takes an optimizer step for every pair and denoising step."""
