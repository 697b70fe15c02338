"""Diffusion-DPO on pairs of the run's own samples, or of recorded ones (arXiv 2311.12908, eq. 14), and its relatives.

    x_t = (1 - t) x0 + t ε                                    t and ε the same for winner and loser
    e   = w(t) mean_D ‖v(x_t, t) - (ε - x0)‖²                 ‖ε_θ - ε‖² for models of the noise (forward.py)
    h   = -(β/2) γ^k [(e_w - e_w^ref) - (e_l - e_l^ref)]      without the ½ where ``dpo_half`` is off
    L   = mean over rows and times of -log σ(h), ipo, hinge or cdpo (pairs.py)

Both members of a pair carry its loss, and rows in no pair carry 0: a group of G with one pair counts 2 in G. Pairs are
made of the advantages, so that several rewards can be weighed as anywhere else; groups that tie have no pair. With
γ < 1 early denoising steps, which a verdict on the picture says more of, count more: k is the number of the rollout's
levels that are noisier than t (arXiv 2402.08265, which discounts the steps of sampled chains: d3po.py does that).

Metrics: ``policy_loss`` over rows in pairs · ``accuracy`` = share of pairs with h > 0 · ``margin`` = h ·
``winner_gain`` and ``loser_gain`` = -(β/2) (e - e^ref): both fall when the loss drives the model away from its data.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import GroupRelative
from rlalign.algorithms.base import Loss, Needs, SampleWith
from rlalign.algorithms.forward import Noised, TimeSettings, Weighting, at_times, likelihood, velocities
from rlalign.algorithms.pairs import PairLoss, Pairs, PairSettings, margin_metrics, marks_of, pair_loss, pairs_of
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Scores, Trajectory


class Config(PairSettings, TimeSettings):
    """The algorithm block with ``name: dpo``."""

    name: Literal["dpo"] = "dpo"
    """This algorithm."""
    beta: float | None = Field(default=None, gt=0)
    """β of mean errors; null: an eighth of the number of latent elements, which is the paper's 2000 for SD1.5."""
    dpo_half: bool = True
    """The factor ½ in h: the paper's code, Flow-GRPO, Flow-Factory and verl-omni have it, diffusers' example not."""
    loss: PairLoss = "sigmoid"
    """What is made of the margin."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=0.5)
    """q of cdpo, how probably a label is wrong."""
    weighting: Weighting = "uniform"
    """w(t) of the errors."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """γ: below 1 the margin shrinks with every level of the rollout's grid that is noisier."""


def implicit_reward(likelihood: Tensor, reference: Tensor, beta: float, half: bool = True) -> Tensor:
    """s = (β/2) (ℓ - ℓ_ref), ℓ = -e: its difference within a pair is h."""
    return (beta / 2 if half else beta) * (likelihood - reference)


def levels_above(sample: Trajectory, t: Tensor) -> Tensor:
    """k [b]: how many of the rollout's levels are noisier than t [b]."""
    return (sample.schedule.flow_grid.to(t) > t[:, None]).sum(1)


class Algorithm(GroupRelative):
    needs = Needs(trajectory=False, silent_zero=True, whole_groups=True)
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config

    def advantages(self, scores: Scores) -> Tensor:
        return marks_of(self.multipliers.weighted(scores), self.config)

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        pairs = pairs_of(sample, advantages)
        for at in at_times(self.config, sample, noise, by_group=True):
            loss = self._loss(policy, sample, pairs, at)
            yield Loss(loss.rows / self.config.num_times, loss.means)

    def _loss(self, policy: Policy, sample: Trajectory, pairs: Pairs, at: Noised) -> Loss:
        config = self.config
        beta = config.beta or sample.final[0].numel() / 8
        v, fixed = velocities(policy, sample, at, ["reference"])
        own, reference = (likelihood(u, at, config.weighting) for u in (v, fixed["reference"]))
        implicit = implicit_reward(own, reference, beta, config.dpo_half)
        if config.discount < 1:
            implicit = implicit * config.discount ** levels_above(sample, at.t)
        h = pairs.margin(implicit)
        rows = pair_loss(h, config.loss, beta, config.label_smoothing) * pairs.inside
        return Loss(rows, {"policy_loss": rows.detach(), **margin_metrics(pairs, h, implicit)})


OVERLAY: dict[str, Any] = {"rollout": {"solver": "dpmpp_2m", "window": None}, "optimizer": {"lr": 3e-4}}
"""Second-order ODE rollouts; nothing is stochastic, so kernel and noise_level do not matter."""


def _method(**algorithm: Any) -> dict[str, Any]:
    """For any model and number of images."""
    return {"algorithm": {"name": "dpo", **algorithm}}


def _paper(size: int, beta: float, **rollout: Any) -> dict[str, Any]:
    return {
        "rollout": {
            **{"size": (size, size), "prompts_per_step": 1024, "samples_per_prompt": 2},
            **{"num_steps": 50, "guidance_scale": 7.5, "solver": "euler", "kernel": "ddim"},
            **rollout,
        },
        "algorithm": {"name": "dpo", "beta": beta, "num_times": 1, "times": "uniform"},
        "optimizer": {"lr": 2.048e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2, "max_grad_norm": 1.0},
        "ema": None,
        "model": {"lora": None},
    }


PRESETS: dict[str, dict[str, Any]] = {
    "online_dpo": _method(),
    "ipo": _method(loss="ipo"),
    "hinge_dpo": _method(loss="hinge"),
    "cdpo": _method(loss="cdpo"),
    "flow_dpo_sd35": {
        "rollout": {
            **{"size": (512, 512), "prompts_per_step": 48, "samples_per_prompt": 24},
            **{"num_steps": 40, "guidance_scale": 4.5, "solver": "euler"},
        },
        "algorithm": {"name": "dpo", "beta": 100.0},
        "optimizer": {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": {"decay": 0.9, "every": 8},
        "model": {"lora": {"rank": 32, "alpha": 64}},
    },
    "dpo_sd15": _paper(512, beta=2000.0),
    "dpo_sdxl": _paper(1024, beta=5000.0),
    "dpo_sd15_pairs": _paper(512, beta=2000.0, source="data", guidance_scale=1.0),
}
"""flow_dpo_sd35 is the baseline in Flow-GRPO's repository. The paper trains on a data set of pairs, without guidance,
which is dpo_sd15_pairs; dpo_sd15 and dpo_sdxl keep its β, its batch of 2048 images and its lr (1e-8 times the batch),
on pairs of the model's own. All are of 1024 pairs a step; β and ½ are as in the paper's code."""
