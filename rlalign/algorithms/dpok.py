"""DPOK: policy gradient with the exact divergence of every step in the loss (arXiv 2305.16381).

    L = mean over samples and kept steps k of  max(-A_k ρ_k, -A_k clip(ρ_k, 1 ± ε)) + β KL(π_θ || π_ref)(y_k)

    baseline    loo: A = r - mean of the group's other rewards      value: A = r - V(c)
    kl_credit   direct: A_k = A                                     to_go: A_k = A - β Σ_{j > k} KL_j

ρ = 1 in the first update, whose gradient is the paper's. Nothing is divided by a std, so that β is in units of the
reward a nat. ``direct`` differentiates each KL at the states visited; ``to_go`` also lets a step answer for the KL of
the kept steps after it, and it alone has the optimum of E r - β Σ KL at rest. KL_j in A_k is the whole divergence; the
penalty is reduced as the log-probs are, and so is the weight between the two. V(c) is not a network but one number a
prompt, which moves towards the mean reward of every new group by ``value_rate``; a new prompt has the loo baseline.

Metrics as in grpo.py, and ``kl_to_go`` = Σ_{j > k} KL_j under ``to_go``.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlalign.algorithms.advantages import loo
from rlalign.algorithms.base import Loss, Needs, SampleWith
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


class Config(Penalised):
    """The algorithm block with ``name: dpok``."""

    name: Literal["dpok"] = "dpok"
    """This algorithm."""
    baseline: Literal["loo", "value"] = "loo"
    """What is taken off a reward: the mean of the group's other samples, or the prompt's running mean V(c)."""
    value_rate: float = Field(default=0.1, gt=0, le=1)
    """Share of the way that V(c) goes towards the mean reward of a new group."""
    kl_weight: float = Field(default=1e-3, ge=0)
    """β, in units of the reward a nat."""
    kl_credit: KlCredit = "direct"
    """to_go: the KL of later kept steps counts in the advantage, at the cost of one more pass a step."""
    clip_range: float = Field(default=1e-4, gt=0, le=1)
    """ε of the ratio; it acts from the second update on."""
    updates_per_step: int = Field(default=1, ge=1)
    """Optimizer steps a batch, each on its own share of whole groups."""


class Values:
    """V(c): one number a prompt, by regression on its rewards."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.values: dict[str, float] = {}

    def advantages(self, prompts: Sequence[str], rewards: Tensor, valid: Tensor) -> Tensor:
        """r - V(c) [P, G], V from before these rewards, which would else be their own baseline; then V moves."""
        known = torch.tensor([[prompt in self.values] for prompt in prompts])
        values = rewards.new_tensor([[self.values.get(prompt, 0.0)] for prompt in prompts])
        advantages = torch.where(known, rewards - values, loo(rewards, valid))
        for prompt, row, real in zip(prompts, rewards, valid, strict=True):
            if real.any():
                mean = float(row[real].mean())
                before = self.values.get(prompt, mean)
                self.values[prompt] = before + self.rate * (mean - before)
        return torch.where(valid, advantages, 0)


class Algorithm:
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs = Needs(trajectory=True, silent_zero=True, densities=config.kl_weight > 0)
        self.values = Values(config.value_rate)

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
        credit = advantages if to_go is None else advantages - beta * to_go[:, slot]
        policy_loss = clipped_policy_loss(rho, credit, epsilon, epsilon)
        means = ratio_means(rho, epsilon, epsilon)
        if to_go is not None:
            means["kl_to_go"] = to_go[:, slot]
        reduction = policy.settings.logprob_reduction
        kl = None if reference is None else held(gaussian.kl(reference.gaussian, reduction), sample.held)
        return kept_step(sample, policy_loss, rho, means, kl, beta)

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        return {}

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
