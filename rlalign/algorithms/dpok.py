"""DPOK: policy gradient with the exact divergence of every step in the loss (arXiv 2305.16381).

    L = mean over samples and kept steps k of  max(-A_k ρ_k, -A_k clip(ρ_k, 1 ± ε)) + β KL(π_θ || π_ref)(y_k)

    baseline    loo: A = r - mean of the group's other rewards  value: A = r - V(c)  state: A = r - V(c) - V(y_k)
    kl_credit   direct: A_k = A                                 to_go: A_k = A - β Σ_{j > k} KL_j

ρ = 1 in the first update, whose gradient is the paper's. Nothing is divided by a std, so that β is in units of the
reward a nat. ``direct`` differentiates each KL at the states visited; ``to_go`` also lets a step answer for the KL of
the kept steps after it, and it alone has the optimum of E r - β Σ KL at rest. KL_j in A_k is the whole divergence; the
penalty is reduced as the log-probs are, and so is the weight between the two. V(c) is one number a prompt, which
moves towards the mean reward of every new group by ``value_rate``; a new prompt has the loo baseline. V(y_k) is what
remains of the reward in the mean, by ridge regression on block means of the state, from earlier batches (baselines.py).
Neither is a network of both, as in the paper.

Metrics as in grpo.py, and ``kl_to_go`` = Σ_{j > k} KL_j under ``to_go``.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import loo
from rlalign.algorithms.base import Loss, Needs, SampleWith, UpdateSettings
from rlalign.algorithms.baselines import StateValue, Values
from rlalign.algorithms.losses import (
    KlCredit,
    clipped_policy_loss,
    kept_step,
    kl_to_go,
    ratio,
    ratio_means,
    reference_steps,
)
from rlalign.algorithms.regularise import Penalised, held
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy, Step
from rlalign.types import Scores, State, Trajectory


class Config(Penalised, UpdateSettings):
    """The algorithm block with ``name: dpok``."""

    name: Literal["dpok"] = "dpok"
    """This algorithm."""
    baseline: Literal["loo", "value", "state"] = "loo"
    """What is taken off a reward: the mean of the group's other samples, the prompt's running mean V(c), or besides
    that what a regression says of the state y_k."""
    value_rate: float = Field(default=0.1, gt=0, le=1)
    """Share of the way that V(c) goes towards the mean reward of a new group, and V(y_k) towards a new batch."""
    kl_weight: float = Field(default=1e-3, ge=0)
    """β, in units of the reward a nat."""
    kl_credit: KlCredit = "direct"
    """to_go: the KL of later kept steps counts in the advantage, at the cost of one more pass a step."""
    clip_range: float = Field(default=1e-4, gt=0, le=1)
    """ε of the ratio; it acts from the second update on."""


class Algorithm:
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        self.config = config
        fits = config.baseline == "state"
        self.needs = Needs(trajectory=True, silent_zero=not fits, densities=config.kl_weight > 0, fits=fits)
        self.values, self.state_value = Values(config.value_rate), StateValue(config.value_rate)

    def advantages(self, scores: Scores) -> Tensor:
        rewards, valid = scores.total.double(), scores.valid
        if self.config.baseline == "loo":
            return loo(rewards, valid).float()
        return self.values.advantages(scores.prompts, rewards, valid).float()

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        references = reference_steps(policy, sample, self.config.kl_weight)
        to_go = kl_to_go(policy, sample, references, self.config.kl_credit)
        for slot, reference in enumerate(references):
            yield self._loss(policy, sample, slot, advantages, to_go, reference)

    def _loss(
        self,
        policy: Policy,
        sample: Trajectory,
        slot: int,
        advantages: Tensor,
        to_go: Tensor | None,
        reference: Step | None,
    ) -> Loss:
        epsilon, beta = self.config.clip_range, self.config.kl_weight
        gaussian = policy.replay(sample, slot).gaussian
        rho = ratio(policy.log_prob(gaussian, sample.x_next[:, slot]), sample.log_probs[:, slot])
        credit = advantages - self.state_value(sample, slot) if self.needs.fits else advantages
        credit = credit if to_go is None else credit - beta * to_go[:, slot]
        policy_loss = clipped_policy_loss(rho, credit, epsilon, epsilon)
        means = ratio_means(rho, epsilon, epsilon)
        if to_go is not None:
            means["kl_to_go"] = to_go[:, slot]
        reduction = policy.settings.logprob_reduction
        kl = None if reference is None else held(gaussian.kl(reference.gaussian, reduction), sample.held)
        return kept_step(sample, policy_loss, rho, means, kl, beta)

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        return {}

    def counted(self, sample: Trajectory, advantages: Tensor) -> Tensor:
        return self.state_value.counted(sample, advantages)

    def fit(self, counted: Tensor) -> None:
        self.state_value.fit(counted)

    @property
    def fitted(self) -> Tensor:
        return self.state_value.sums

    def load_fitted(self, fitted: Tensor) -> None:
        self.state_value.load(fitted)

    def state_dict(self) -> State:
        return State(values={"values": dict(self.values.values)})

    def load_state_dict(self, state: State) -> None:
        self.values.values = dict(state.values["values"])


_DDIM: dict[str, Any] = {"kernel": "ddim", "noise_level": 1.0, "window": None, "solver": "euler"}

OVERLAY: dict[str, Any] = {
    "rollout": {"kernel": "flow_sde", "noise_level": 0.7, "window": None, "solver": "euler"},
    "optimizer": {"lr": 3e-4, "eps": 1e-15},
}
"""All steps but the last are stochastic, as the divergence of the whole path asks for. On a flow path the paper's DDIM
with η = 1 leaves so little noise in the last of them that their divergence is all that there is."""

PRESETS: dict[str, dict[str, Any]] = {
    "dpok_sd15": {
        "rollout": {
            "size": (512, 512),
            "prompts_per_step": 1,
            "samples_per_prompt": 6,
            "num_steps": 50,
            "guidance_scale": 7.5,
            **_DDIM,
        },
        "algorithm": {"name": "dpok", "clip_range": 1e-4, "updates_per_step": 1},
        "optimizer": {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 0.1},
        "ema": None,
        "model": {"lora": {"rank": 4, "alpha": 4}},
    },
}
"""One prompt, as in the published code; where that makes five updates on random steps from a buffer, this makes one on
all steps. Its weights (reward 100, KL 0.01) belong to another penalty and do not carry over: kl_weight is our own."""
