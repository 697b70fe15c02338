"""Terms that several algorithms share: pure functions, one number a row."""

from typing import Literal

import torch
from torch import Tensor

from rlalign.algorithms.base import Loss
from rlalign.algorithms.regularise import held
from rlalign.mdp.prediction import from_network
from rlalign.models.base import Unusable
from rlalign.policy import Policy, Step, Variant
from rlalign.types import Trajectory

KlForm = Literal["gaussian", "no_tau", "mean_sq", "velocity"]
DENSITIES: tuple[KlForm, ...] = ("gaussian", "no_tau")  # whose weight means the same in all steps beside densities
KlCredit = Literal["direct", "to_go"]
StepWeight = Literal["none", "tempflow", "flash"]


def ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """ρ = π(y'|y) / π_old(y'|y): exactly 1 where the two log-probs are the same number."""
    return (log_probs - old_log_probs).exp()


def clipped_policy_loss(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """L = max(-A ρ, -A clip(ρ, 1 - low, 1 + high)): PPO, arXiv 1707.06347 (eq. 7); DDPO and Flow-GRPO, per step."""
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def guarded_ratio(log_probs: Tensor, old_log_probs: Tensor, divergence: Tensor, std: Tensor) -> Tensor:
    """ρ̃ = exp(c (log π - log π_old + D)), D = (μ - μ_old)² / (2c²): GRPO-Guard, arXiv 2510.22319; all are [b].

    The exponent is z (μ - μ_old): its mean is 0 and its spread the same at every step, which those of log ρ are not.
    """
    return (std * (log_probs - old_log_probs + divergence)).exp()


def trusted(divergence: Tensor, ratio: Tensor, advantages: Tensor, threshold: float) -> Tensor:
    """[b] M = 0 where D ≥ δ and the gradient would drive ρ still further from 1: Flow-DPPO, arXiv 2606.11025."""
    outwards = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
    return (~(outwards & (divergence >= threshold))).to(ratio)


def ratio_means(ratio: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """``ratio/mean``, and which rows lie beyond either end of the clip range, whatever their advantage."""
    above, below = (ratio > 1 + high).float(), (ratio < 1 - low).float()
    return {
        "ratio/mean": ratio.detach(),
        "clip_fraction": above + below,
        "clip_fraction_high": above,
        "clip_fraction_low": below,
    }


def divergence(form: KlForm, step: Step, reference: Step, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """[b] how far a step is from the reference's (docs/kernels.md; c is the whole std of the step, τ = σ - σ'), in the
    samples that are to be held.

    gaussian   (μ - μ_ref)² / (2c²)      the Kullback-Leibler divergence itself
    no_tau     τ (μ - μ_ref)² / (2c²)    flow_grpo and verl-omni, whose std lacks √τ: to be used with published weights
    mean_sq    (μ - μ_ref)²              Flow-Factory, x-based
    velocity   (v - v_ref)²              Flow-Factory, v-based; does not depend on the kernel

    The first two are reduced as the log-probs are, so that the weight keeps its meaning; the others are means.
    """
    if form == "velocity":
        return held(mean_square(step.prediction.velocity - reference.prediction.velocity), step.held)
    if form == "mean_sq":
        return held(mean_square(step.gaussian.mean - reference.gaussian.mean), step.held)
    kl = held(step.gaussian.kl(reference.gaussian, reduction), step.held)
    return kl if form == "gaussian" else step_length(step) * kl


def step_length(step: Step) -> Tensor:
    """τ = σ - σ' [b]; Unusable off the flow path, where noise levels are no times."""
    if not torch.allclose(step.now.alpha + step.now.sigma, torch.ones_like(step.now.sigma), atol=1e-4):
        raise Unusable(
            "the length τ of a step belongs to flow-matching models, and this one is not: set algorithm.kl_form to "
            "gaussian or velocity, and for grpo_guard guard_div_tau: false"
        )
    return (step.now.sigma - step.nxt.sigma).flatten()


@torch.no_grad()
def fixed_step(policy: Policy, name: Variant, sample: Trajectory, slot: int) -> Step:
    """The step under other weights. To be asked for first: they borrow the parameters that a graph would hold.

    ``reference`` means the policy's anchor, which may have moved (regularise.py).
    """
    with policy.using(policy.anchor if name == "reference" else name):
        return policy.replay(sample, slot)


def reference_steps(policy: Policy, sample: Trajectory, kl_weight: float) -> list[Step | None]:
    """Of each kept step the reference's, None where nothing is held to it."""
    slots = range(sample.num_kept)
    return [fixed_step(policy, "reference", sample, slot) if kl_weight > 0 else None for slot in slots]


def kl_to_go(policy: Policy, sample: Trajectory, references: list[Step | None], credit: KlCredit) -> Tensor | None:
    """[b, K] Σ_{j > k} KL_j, the whole divergences of the kept steps after each; None where they are not its credit."""
    if credit == "direct":
        return None
    steps = [(fixed_step(policy, "policy", sample, slot), ref) for slot, ref in enumerate(references) if ref]
    if not steps:
        return None
    kls = torch.stack([held(step.gaussian.kl(ref.gaussian, "sum"), sample.held) for step, ref in steps], 1)
    return kls.flip(1).cumsum(1).flip(1) - kls


def kept_step(
    sample: Trajectory,
    policy_loss: Tensor,
    rho: Tensor,
    means: dict[str, Tensor],
    kl: Tensor | None,
    kl_weight: float,
) -> Loss:
    """Of one kept step: the policy term, and the penalty where there is one."""
    rows, means = policy_loss, {"policy_loss": policy_loss.detach(), **means}
    if kl is not None:
        rows, means["kl"] = rows + kl_weight * kl, kl.detach()
    return Loss(rows / sample.num_kept, means, {"ratio/max_abs_dev": (rho.detach() - 1).abs()})


def step_weights(kind: StepWeight, policy: Policy, sample: Trajectory) -> Tensor:
    """[b, K]: what the loss of each kept step is multiplied by; mean 1 over the steps that the rollout may keep.

    tempflow   ∝ c_k                                        TempFlow-GRPO, arXiv 2508.04324: s √τ is our c
    flash      ∝ 1 / γ_k, γ_k = |∂μ_k / ∂output| / c_k      Flash-GRPO, arXiv 2605.15980: log-probs of equal slope

    For Euler-Maruyama kernels γ = √τ (1/s + s (1 - σ) / (2σ)); here it is read off the kernel, whichever it is.
    """
    if kind == "none":
        return torch.ones_like(sample.log_probs)
    window = policy.settings.window
    schedule = policy.schedule(policy.settings)  # of all steps: a compressed chain's own ends early, behind its window
    low, high = window.bounds(schedule.num_steps) if window else (0, schedule.num_steps - 1)
    at = torch.arange(schedule.num_steps - 1)
    x = torch.zeros(len(at), 1, dtype=torch.float64)
    now, nxt = schedule.level(at, x), schedule.level(at + 1, x)
    pushed = policy.kernel(x, from_network(policy.family.prediction, x + 1, x, now), now, nxt)  # linear: 0 gives 0
    std = pushed.std.expand_as(x).flatten()
    weights = std if kind == "tempflow" else std / pushed.mean.flatten().abs()
    return (weights / weights[low:high].mean())[sample.steps.cpu()].to(sample.log_probs)


def mean_square(x: Tensor) -> Tensor:
    """mean_D(x²): [b, *L] -> [b]."""
    return x.square().flatten(1).mean(1)
