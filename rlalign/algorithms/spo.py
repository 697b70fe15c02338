"""SPO: step-by-step preference optimisation, a preference in every step (arXiv 2406.04314).

    x'_1 .. x'_k ~ π_θ(x' | x_t, c),    w and l = the best and the worst of them by r(x̂0(x'), c)
    ρ = log π_θ(x' | x_t, c) - log π_ref(x' | x_t, c),  kept within log(1 ± ε)
    L = mean over states x_t of  -log σ(β [ρ^w - ρ^l]);    the chain goes on from one of the k, drawn at random

Candidates of one state differ in their noise alone, so the verdict is on this step; ``rollout.candidates`` is k, and a
sample of the batch is one candidate. The paper has a preference model that is told the noise level judge the decoded
clean latent x̂0 which the net sees in x'. Here the run's own rewards judge that picture, and are told nothing: any
reward will do, the best is one that has learned from such pictures. All candidates of a state carry its loss, which is
0 where best and worst are equal or too close. Log-ratios are reduced as the run's log-probs are.

Metrics: ``policy_loss`` · ``accuracy`` = share of states with h > 0 · ``margin`` = h = β [ρ^w - ρ^l] · ``winner_gain``
and ``loser_gain`` = the two halves of h · ``clip_fraction`` = share of ρ outside log(1 ± ε), whose gradient is cut ·
``ratio/mean`` and ``ratio/max_abs_dev`` of π_θ to the weights that sampled: exactly 1 and 0 on fresh samples.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from rlalign.algorithms.advantages import center
from rlalign.algorithms.base import Loss, Needs, SampleWith, Stateless, UpdateSettings
from rlalign.algorithms.losses import fixed_step
from rlalign.algorithms.pairs import log_ratio, pair_loss, within
from rlalign.algorithms.regularise import Anchored
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Scores, Trajectory


class Config(Anchored, UpdateSettings):
    """The algorithm block with ``name: spo``."""

    name: Literal["spo"] = "spo"
    """This algorithm."""
    beta: float = Field(default=10.0, gt=0)
    """β of the log-ratios."""
    clip_range: float | None = Field(default=0.1, gt=0, lt=1)
    """ε of the ratio to the reference in each step; null: no bound."""
    min_difference: float = Field(default=0.0, ge=0)
    """Best and worst must differ by more than this in the weighted sum of rewards, or the state teaches nothing."""


class Algorithm(Stateless):
    needs = Needs(trajectory=True, whole_groups=True, candidates=True)
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        self.config = config

    def advantages(self, scores: Scores) -> Tensor:
        """Only their order within a state matters, and how far its ends are apart."""
        return center(scores.total.double(), scores.valid).float()

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        state = states_of(sample, policy.settings.candidates or 1)
        best, worst = extremes(advantages, state)
        told = (advantages[best] - advantages[worst] > self.config.min_difference).to(advantages)  # [S]

        shared = sample.take(best)  # every candidate of a state has its x_t: one pass of the net tells of them all
        reference = fixed_step(policy, "reference", shared, 0).gaussian
        step, reduction = policy.replay(shared, 0).gaussian, policy.settings.logprob_reduction

        def seen(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x_next = sample.x_next[rows, 0]
            rho, outside = within(log_ratio(step, reference, x_next, reduction), self.config.clip_range)
            ratio = (policy.log_prob(step, x_next).detach() - sample.log_probs[rows, 0]).exp()
            return self.config.beta * told * rho, told * outside, ratio

        (winner, *winners), (loser, *losers) = seen(best), seen(worst)
        outside, ratio = (torch.stack(pair) for pair in zip(winners, losers, strict=True))
        h = winner - loser
        loss = told * pair_loss(h, "sigmoid", self.config.beta)
        means = {
            "policy_loss": loss,
            "accuracy": (h > 0).to(h),
            "margin": h,
            "winner_gain": winner,
            "loser_gain": loser,
            "clip_fraction": outside.mean(0),
            "ratio/mean": ratio.mean(0),
        }
        maxima = {"ratio/max_abs_dev": (ratio - 1).abs().amax(0)[state]}
        yield Loss(loss[state], {name: value.detach()[state] for name, value in means.items()}, maxima)


def states_of(sample: Trajectory, candidates: int) -> Tensor:
    """[b] int64: which of the micro-batch's S states each row starts from; candidates of one follow each other."""
    place = sample.address.clone()
    place[:, 2] //= candidates
    return pad(place.diff(dim=0).any(1).long(), (1, 0)).cumsum(0)


def extremes(values: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """[S], [S] int64: the rows of highest and of lowest value of each state."""
    member = torch.arange(int(state.max()) + 1, device=state.device)[:, None] == state  # [S, b]
    highest = torch.where(member, values, -torch.inf).argmax(1)
    return highest, torch.where(member, values, torch.inf).argmin(1)


OVERLAY: dict[str, Any] = {
    "rollout": {
        **{"kernel": "ddim", "noise_level": 1.0, "solver": "euler", "init_noise": "independent"},
        **{"candidates": 4, "window": {"size": 2, "range": "all"}},
    },
    "optimizer": {"eps": 1e-15},
}
"""Four candidates in each of two neighbouring steps, which makes eight samples of a chain, the usual group."""

PRESETS: dict[str, dict[str, Any]] = {
    "spo_sd15": {
        "rollout": {
            **{"size": (512, 512), "prompts_per_step": 40, "samples_per_prompt": 60, "num_steps": 20},
            **{"guidance_scale": 5.0, "kernel": "ddim", "noise_level": 1.0, "solver": "euler"},
            **{"init_noise": "independent", "candidates": 4, "window": {"size": 15, "range": (4, 19)}},
        },
        "algorithm": {"name": "spo", "beta": 10.0, "clip_range": 0.1, "updates_per_step": 15},
        "optimizer": {"lr": 6e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": None,
        "model": {"lora": {"rank": 4, "alpha": 4}},
    },
}
"""The published code for Stable Diffusion 1.5: 10 prompts on each of 4 GPUs, a chain each, 40 pairs an optimizer step.
There the first four steps are stochastic as well, the last one is trained too, the pairs of a batch are shuffled,
and a pair counts if the softmax of its two scores differs by more than 0.3: that is ``min_difference: 0.62`` for its
own preference model, whose scale other rewards do not share."""
