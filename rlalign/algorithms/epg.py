"""ELBO policy gradient, EPG, and its relatives PEPG and PAR (arXiv 2602.04663).

    ℓ  = -w(t) mean (v - u)², u = ε - x0;   d = sg(ℓ_θ) - ℓ_old;   ρ = e^d, or 1 without importance weights
    epg    L = -ρ A ℓ_θ
    pepg   L = -ρ (A - d) ℓ_θ                    A less the penalty for leaving the old policy
    par    L = ½ ρ (A - (ℓ_θ - ℓ_old))²          the advantage as a regression target
    +      β_KL kl        girsanov   w_kl(t) mean (v_θ - v_ref)²
                          k1 q    k2 q²/2    k3 e^-q - 1 + q,      q = ℓ_θ - ℓ_ref
    no gradient of ℓ_θ where ρ has left 1 ± ε in the direction that its factor pushes
    after each step:  θ_old <- d' θ_old + (1 - d') θ

Samples come from θ_old through an ODE. pepg and par have the same gradient: they differ in the value that is logged.
Were ℓ the log-likelihood, both would stop at π_old e^A.

Metrics: ``policy_loss`` before the penalty · ``kl`` when its weight is positive · ``old_gap`` = d · the ratio's metrics
as in grpo.py · ``old_decay`` = d' of the step.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith, lag
from rlalign.algorithms.forward import Look, Ramp, RatioSettings, Weighting, beyond, look
from rlalign.algorithms.losses import ratio_means
from rlalign.algorithms.regularise import held
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Variant
from rlalign.types import Trajectory

Objective = Literal["epg", "pepg", "par"]
KlForm = Literal["girsanov", "k1", "k2", "k3"]


class Config(RatioSettings):
    """The algorithm block with ``name: epg``."""

    name: Literal["epg"] = "epg"
    """This algorithm."""
    objective: Objective = "epg"
    """Which of the three losses."""
    weighting: Weighting = "elbo"
    """w(t) of the velocity's error; elbo makes ℓ a bound of the log-likelihood, per latent element."""
    importance: bool = True
    """Rows weigh e^d, for samples of the old policy; False: all alike."""
    clip_range: float | None = Field(default=1e-3, gt=0)
    """ε of e^d; null: no clip."""
    kl_form: KlForm = "girsanov"
    """How the distance to the reference is measured."""
    old_decay: Ramp = Ramp(rate=0.001, max=0.5)
    """d' by optimizer step; with rate: 0 and max: 0 there are no old weights but those that a step begins with."""

    @property
    def old(self) -> Variant:
        """The weights of ℓ_old."""
        return "old" if self.old_decay.max > 0 else self.began_with


def surrogate(objective: Objective, likelihood: Tensor, gap: Tensor, advantages: Tensor) -> Tensor:
    """[b] the loss before its importance weight; gap d = ℓ_θ - ℓ_old, detached."""
    if objective == "epg":
        return -advantages * likelihood
    if objective == "pepg":
        return -(advantages - gap) * likelihood
    return (advantages - gap - (likelihood - likelihood.detach())).square() / 2


def kl_estimate(form: Literal["k1", "k2", "k3"], q: Tensor) -> Tensor:
    """[b] of KL(π_θ || π_ref) for samples of π_θ, q = ℓ_θ - ℓ_ref; k2 and k3 are never negative."""
    return {"k1": q, "k2": q.square() / 2, "k3": (-q).exp() - 1 + q}[form]


class Algorithm(GroupRelative):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config
        self.sample_with: SampleWith = "old" if config.old == "old" else "policy"
        copies = () if config.old == "policy" else ("old",) if config.old == "old" else ("start",)
        self.needs = Needs(trajectory=False, copies=copies, silent_zero=config.objective == "epg")

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        config = self.config
        others: list[Variant] = [config.old, "reference"] if config.kl_weight > 0 else [config.old]
        for seen in look(policy, sample, noise, config, others):
            yield self._loss(seen, advantages)

    def _loss(self, seen: Look, advantages: Tensor) -> Loss:
        config, own = self.config, seen.likelihood
        epsilon = torch.inf if config.clip_range is None else config.clip_range
        gap = own.detach() - seen.fixed[config.old]
        rho, favour = gap.exp(), advantages if config.objective == "epg" else advantages - gap
        own = torch.where(beyond(rho, favour, epsilon, epsilon), own.detach(), own)
        rows = surrogate(config.objective, own, gap, advantages) * (rho if config.importance else 1)
        means = {"policy_loss": rows.detach(), "old_gap": gap, **ratio_means(rho, epsilon, epsilon)}
        if config.kl_weight > 0:
            kl = self._kl(seen)
            rows, means["kl"] = rows + config.kl_weight * kl, kl.detach()
        return Loss(rows * seen.share, means, {"ratio/max_abs_dev": (rho - 1).abs()})

    def _kl(self, seen: Look) -> Tensor:
        if self.config.kl_form == "girsanov":
            return seen.distances["reference"]
        return held(kl_estimate(self.config.kl_form, seen.likelihood - seen.fixed["reference"]), seen.held)

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        return lag(policy, self.needs.copies, self.config.old_decay.at(updates))


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""

PRESETS: dict[str, dict[str, Any]] = {
    "epg_sd35": {
        "rollout": {"guidance_scale": 1.0, "solver": "dpmpp_2m", "size": (512, 512)},
        "algorithm": {"name": "epg", "objective": "epg", "weighting": "elbo", "clip_range": 1e-3},
        "optimizer": {"lr": 3e-4},
        "model": {"lora": {"rank": 32, "alpha": 64}},
    },
    "pepg": {"rollout": {}, "algorithm": {"name": "epg", "objective": "pepg"}, "optimizer": {}},
    "par": {"rollout": {}, "algorithm": {"name": "epg", "objective": "par"}, "optimizer": {}},
}
"""epg_sd35 holds what is known of the paper's run; learning rate and LoRA are those of its neighbours."""
