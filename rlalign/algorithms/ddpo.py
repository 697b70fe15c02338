"""DDPO, policy gradient on the denoising chain with a running baseline per prompt (arXiv 2305.13301).

    sf   L = -mean over samples and kept steps k of  A log π_θ(y_{k+1} | y_k, c)         REINFORCE, one update a batch
    is   L =  mean over samples and kept steps k of  max(-A ρ_k, -A clip(ρ_k, 1 ± ε))    several updates a batch
    A    = (r - mean) / (std + 1e-6) over the prompt's last ``buffer_size`` rewards, the present ones among them;
           over the batch while the prompt has fewer than ``min_count``

No reference and no penalty: watch the held-out rewards. Metrics as in grpo.py, without ``kl``; under ``sf`` the ratio
is not used, only reported.
"""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from rlalign.algorithms.base import Loss, Needs, SampleWith, UpdateSettings
from rlalign.algorithms.baselines import Tracker
from rlalign.algorithms.losses import clipped_policy_loss, ratio, ratio_means
from rlalign.mdp.noise import Noise
from rlalign.policy import Policy
from rlalign.types import Scores, State, Trajectory


class Config(UpdateSettings):
    """The algorithm block with ``name: ddpo``."""

    name: Literal["ddpo"] = "ddpo"
    """This algorithm."""
    mode: Literal["sf", "is"] = "is"
    """Score function, or importance sampling with a clipped ratio."""
    clip_range: float = Field(default=1e-4, gt=0)
    """ε of the ratio, in mode is."""
    buffer_size: int = Field(default=16, ge=1)
    """Rewards of a prompt that its mean and std are taken over."""
    min_count: int = Field(default=16, ge=1)
    """With fewer of them, mean and std of the batch are used."""
    adv_clip: float = Field(default=5.0, gt=0)
    """Advantages are clamped to +-adv_clip."""

    @model_validator(mode="after")
    def _fresh(self) -> "Config":
        if self.mode == "sf" and not self.single:
            raise ValueError(
                "mode: sf is right for fresh samples only: set updates_per_step: 1 and epochs_per_step: 1, or mode: is"
            )
        if self.min_count > self.buffer_size:
            raise ValueError(f"min_count {self.min_count} is never reached with buffer_size {self.buffer_size}")
        return self


class Algorithm:
    sample_with: SampleWith = "policy"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.needs = Needs(trajectory=True, silent_zero=True, log_probs_only=True, fresh=config.mode == "sf")
        self.tracker = Tracker(config.buffer_size, config.min_count)

    def advantages(self, scores: Scores) -> Tensor:
        advantages = self.tracker.advantages(scores.prompts, scores.total.double(), scores.valid)
        return advantages.clamp(-self.config.adv_clip, self.config.adv_clip).float()

    def losses(self, policy: Policy, sample: Trajectory, advantages: Tensor, noise: Noise) -> Iterator[Loss]:
        epsilon = self.config.clip_range
        for slot in range(sample.num_kept):
            log_probs, sampled = policy.log_probs(sample, slot)
            rho = ratio(log_probs, sampled)
            clipped = clipped_policy_loss(rho, advantages, epsilon, epsilon)
            policy_loss = -advantages * log_probs if self.config.mode == "sf" else clipped
            means = {"policy_loss": policy_loss.detach(), **ratio_means(rho, epsilon, epsilon)}
            yield Loss(policy_loss / sample.num_kept, means, {"ratio/max_abs_dev": (rho.detach() - 1).abs()})

    def after_step(self, policy: Policy, updates: int) -> dict[str, float]:
        return {}

    def state_dict(self) -> State:
        return State(values={"rewards": self.tracker.rewards})

    def load_state_dict(self, state: State) -> None:
        self.tracker.rewards = dict(state.values["rewards"])


_DDIM: dict[str, Any] = {"kernel": "ddim", "noise_level": 1.0, "window": None, "solver": "euler"}

OVERLAY: dict[str, Any] = {
    "rollout": _DDIM,
    "optimizer": {"eps": 1e-15},
}
"""The paper's kernel; it preserves the marginals of any path, so that flow models take it as well."""

PRESETS: dict[str, dict[str, Any]] = {
    "ddpo_sd15": {
        "rollout": {
            "prompts_per_step": 32,
            "samples_per_prompt": 8,
            "num_steps": 50,
            "guidance_scale": 5.0,
            **_DDIM,
            "size": (512, 512),
        },
        "algorithm": {"name": "ddpo", "mode": "is", "clip_range": 1e-4, "updates_per_step": 4},
        "optimizer": {"lr": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": None,
        "model": {"lora": {"rank": 4, "alpha": 4}},
    },
    "reinforce": {"algorithm": {"name": "ddpo", "mode": "sf", "updates_per_step": 1}},
}
"""256 images a step, as for the JPEG tasks (aesthetic: 2 updates); the paper draws their prompts one by one, not in
groups. All steps but the last are trained. ``reinforce`` is the score function, for any model."""
