"""PRDP: the chain's log-likelihood ratios are to predict differences of rewards (arXiv 2402.08714, eq. 14 to 21).

    r̂_i = Σ_k ρ_ik,   ρ_ik = log π_θ(y_{k+1} | y_k, c) - log π_ref(y_{k+1} | y_k, c)         of the true densities
    l_ij = max{ [r̂_i - r̂_j - (r_i - r_j)/β]²,  [r̂_i^clip - r̂_j^clip - (r_i - r_j)/β]² }
    L    = mean over the pairs of a group; r̂^clip = Σ_k ρ_ik held within ± ε of its value under the sampler's weights

No loss is left exactly at the maximum of E r - β KL(π_θ || π_ref) over chains, if all samples of a group start from the
same noise, or the kernel forgets it: no step can explain what the start decides. The advantage is the centred reward.
A row carries the mean over its pairs. The square needs all steps at once and costs a second pass (pairs.py).

Metrics: ``policy_loss`` · ``reward_error`` = mean of [β (r̂_i - r̂_j) - (r_i - r_j)]², in units of the reward ·
``ratio/mean``, ``ratio/max_abs_dev`` and ``clip_fraction`` as in grpo.py.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import center
from rlalign.algorithms.base import Loss, Needs, SampleWith, Stateless, UpdateSettings
from rlalign.algorithms.forward import group_index
from rlalign.algorithms.pairs import whole_trajectory
from rlalign.algorithms.regularise import Anchored
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Scores, Trajectory


class Config(Anchored, UpdateSettings):
    """The algorithm block with ``name: prdp``."""

    name: Literal["prdp"] = "prdp"
    """This algorithm."""
    beta: float = Field(default=0.1, gt=0)
    """β, what a nat of divergence costs in units of the reward."""
    clip_range: float = Field(default=1e-4, gt=0)
    """ε by which a step's log-prob, as the run reduces it, may leave the sampler's; it matters from the 2nd update."""


def proximal(rho: Tensor, to_sampler: Tensor, bound: float) -> Tensor:
    """ρ held within ± bound of ρ_old = ρ - (log π_θ - log π_old); what is held has no gradient."""
    old = rho.detach() - to_sampler
    return old + (rho - old).clamp(-bound, bound)


def pair_errors(implicit: Tensor, target: Tensor) -> Tensor:
    """[b, b]: (r̂_i - r̂_j - (target_i - target_j))²."""
    missed = implicit - target
    return (missed[:, None] - missed).square()


def mean_over_pairs(errors: Tensor, group: Tensor) -> Tensor:
    """[b, b] -> [b]: of each row with the others of its group; 0 for a row alone."""
    other = (group[:, None] == group) & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    return torch.where(other, errors, 0).sum(1) / other.sum(1).clamp(min=1)


class Algorithm(Stateless):
    needs = Needs(trajectory=True, whole_groups=True, densities=True)  # a row of average reward is in pairs, too
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        self.config = config

    def advantages(self, scores: Scores) -> Tensor:
        return center(scores.total.double(), scores.valid).float()

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        group = group_index(sample)
        scale = sample.final[0].numel() if policy.settings.logprob_reduction == "mean" else 1

        def loss(rho: Tensor, to_sampler: Tensor) -> Loss:
            return self._loss(rho, to_sampler, scale, advantages / self.config.beta, group)

        yield from whole_trajectory(policy, sample, "sum", loss)

    def _loss(self, rho: Tensor, to_sampler: Tensor, scale: int, target: Tensor, group: Tensor) -> Loss:
        """ρ [b, K] are log-ratios of the densities, log-probs to the sampler's by 1 / scale of that."""
        epsilon = self.config.clip_range
        plain = pair_errors(rho.sum(1), target)
        held = pair_errors(proximal(rho, scale * to_sampler, scale * epsilon).sum(1), target)
        rows = mean_over_pairs(torch.maximum(plain, held), group)
        ratio = to_sampler.exp()
        means = {
            "policy_loss": rows,
            "reward_error": self.config.beta**2 * mean_over_pairs(plain, group),
            "ratio/mean": ratio.mean(1),
            "clip_fraction": (to_sampler.abs() > epsilon).to(rho).mean(1),
        }
        detached = {name: value.detach() for name, value in means.items()}
        return Loss(rows, detached, {"ratio/max_abs_dev": (ratio - 1).abs().amax(1)})


_DDPM: dict[str, Any] = {"kernel": "ddpm", "window": None, "solver": "euler", "init_noise": "shared"}

OVERLAY: dict[str, Any] = {"rollout": _DDPM, "optimizer": {"eps": 1e-15}}
"""All steps but the last stochastic and trained. DDPM's posterior forgets the start, and a shared start settles it."""

PRESETS: dict[str, dict[str, Any]] = {
    "prdp_sd14": {
        "rollout": {
            **{"size": (512, 512), "prompts_per_step": 64, "samples_per_prompt": 8, "num_steps": 50},
            **{"guidance_scale": 5.0, **_DDPM, "init_noise": "independent"},
        },
        "algorithm": {"name": "prdp", "beta": 3e-6 / (50 * 16384), "clip_range": 1e-4},
        "optimizer": {"lr": 7e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": None,
        "model": {"lora": None},
    },
}
"""The paper's run on 100 thousand prompts. Its 3e-6 is the β of log-ratios that are means over the 50 steps (its
appendix G) and, as its clip range tells, over the 16384 latent elements: here they are sums."""
