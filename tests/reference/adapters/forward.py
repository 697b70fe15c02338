"""Adapters of the forward algorithms."""

from typing import Any

import torch
from torch import Tensor

from rlalign.algorithms.crd import centred_loss, reward_adaptive, self_normalized_error
from rlalign.algorithms.dgpo import group_weight
from rlalign.algorithms.forward import (
    Noised,
    TimeWeighting,
    Weighting,
    beyond,
    distance,
    error,
    likelihood,
    mean_over_times,
)
from rlalign.algorithms.losses import clipped_policy_loss, mean_square, ratio

from ..cases import Adapter, Case, Outputs

WEIGHTINGS: dict[str, Weighting] = {"Uniform": "uniform", "t": "t", "t**2": "t2", "huber": "huber", "ghuber": "ghuber"}
PENALTIES: dict[str, TimeWeighting] = {"Uniform": "uniform", "ELBO": "flow_sde"}


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, of)
    return grad


def towards(target: Tensor) -> Noised:
    """Of which only the target velocity u matters: x0 = 0 and ε = u."""
    zeros = torch.zeros_like(target)
    return Noised(zeros, zeros, target.new_ones(len(target)), target)


def awm(
    case: Case, penalties: list[tuple[str, float, TimeWeighting]], bound: float, low: float, high: float
) -> Outputs:
    """Rows are times after times, each of the whole batch; the advantages are those of the batch."""
    inputs, params = case.inputs, case.params
    v, t = inputs["model_output"].requires_grad_(), inputs["t"]
    at = Noised(inputs["clean_latents"], inputs["clean_latents"], t, inputs["noise"])
    own, old = (
        likelihood(velocity, at, WEIGHTINGS[params["weighting"]]) for velocity in (v, inputs["old_model_output"])
    )
    scale = params["advantage_max"] / bound if params.get("advantage_max") else 1.0
    advantages = inputs["advantages"].clamp(-bound, bound) * scale
    times = len(t) // len(advantages)
    if params.get("loss_type") == "sum_first":
        rho = ratio(*(mean_over_times(part.chunk(times)) for part in (own, old)))
    else:
        rho, advantages = ratio(own, old), advantages.repeat(times)
    policy_loss = clipped_policy_loss(rho, advantages, low, high).mean()
    loss = policy_loss
    for name, weight, weighting in penalties:
        loss = loss + weight * distance(v, inputs[f"{name}_model_output"], at, weighting).mean()
    return {
        "loss": loss,
        "policy_loss": policy_loss,
        "log_prob": own,
        "ratio": rho,
        "grad_model_output": gradient(loss, v),
    }


def awm_paper(case: Case) -> Outputs:
    p = case.params
    penalties: list[tuple[str, float, TimeWeighting]] = [
        ("ref", p["beta"], PENALTIES[p["kl_weight"]]),
        ("ema", p["ema_beta"], PENALTIES[p["kl_ema_weight"]]),
    ]
    return awm(case, penalties, p["adv_clip_max"], p["clip_range"], p["clip_range"])


def awm_flow_factory(case: Case) -> Outputs:
    p = case.params
    penalties: list[tuple[str, float, TimeWeighting]] = [
        ("ref", p["kl_beta"], "uniform"),
        ("ema", p["ema_kl_beta"], "uniform"),
    ]
    return awm(case, penalties, p["adv_clip"], -p["clip_lo"], p["clip_hi"])


def dgpo(case: Case) -> Outputs:
    inputs, p = case.inputs, case.params
    v, advantages, at = inputs["model_output"].requires_grad_(), inputs["advantages"], towards(inputs["target_v"])
    e, e_old, e_ref = (error(x, at, "uniform") for x in (v, inputs["old_model_output"], inputs["ref_model_output"]))
    compared = e_old if p["use_ema_ref"] else e_ref
    still = beyond((e_old - e.detach()).exp(), advantages, p["clip_range"], p["clip_range"]) & p["clip_dsm"]
    weight = group_weight(e - compared, advantages, inputs["group"], p["dpo_beta"])
    policy_loss = (weight * advantages * torch.where(still, e.detach(), e)).mean()
    kl = distance(v, inputs["ref_model_output"], at, "uniform")
    kl = torch.where(still, kl.detach(), kl) if p["clip_kl"] else kl
    loss = policy_loss + p["kl_beta"] * kl.mean()
    return {"loss": loss, "dgpo_loss": policy_loss, "grad_model_output": gradient(loss, v)}


def crd(case: Case) -> Outputs:
    """The public code centres over the whole micro-batch, whatever its groups."""
    inputs, p = case.inputs, case.params
    v, at, bound = inputs["model_output"].requires_grad_(), towards(inputs["target_v"]), p["adv_clip"]
    measure = self_normalized_error if p["adaptive_logp"] else plain_error
    implicit = measure(inputs["old_model_output"], at) - measure(v, at)
    targets = (inputs["advantages"].clamp(-bound, bound) / (2 * bound) + 0.5).clamp(0, 1)
    form: dict[str, Any] = {"mse": "square", "bce": "cross_entropy"}
    temperature = p["weight_temp"] if p["weight_temp"] > 0 else None
    whole = torch.zeros_like(inputs["group"])
    losses = centred_loss(implicit, targets, whole, p["crd_beta"], form[p["crd_loss_type"]], temperature)
    policy_loss = (bound / p["crd_beta"] * losses).mean()
    kl = distance(v, inputs["ref_model_output"], at, "uniform")
    kl = kl * reward_adaptive(targets, p["kl_beta"]) if p["reward_adaptive_kl"] else kl
    loss = policy_loss + p["kl_beta"] * kl.mean()
    return {"loss": loss, "policy_loss": policy_loss, "r_theta": implicit, "grad_model_output": gradient(loss, v)}


def plain_error(v: Tensor, at: Noised) -> Tensor:
    return error(v, at, "uniform")


def sft(case: Case) -> Outputs:
    """Advantages weigh the samples, as the weights of rwr and raft do."""
    inputs = case.inputs
    v = inputs["model_output"].requires_grad_()
    at = Noised(inputs["latents"], inputs["latents"], inputs["sigmas"].flatten(), inputs["noise"])
    loss = (inputs["advantages"] * error(v, at, "uniform")).mean()
    return {"loss": loss, "grad_model_output": gradient(loss, v)}


def distill(case: Case) -> Outputs:
    v = case.inputs["noise_pred"].requires_grad_()
    loss = mean_square(v - case.inputs["teacher"]).mean()
    return {"loss": loss, "grad_noise_pred": gradient(loss, v)}


KERNELS: dict[tuple[str, str], Adapter] = {
    ("awm_loss", "AWM"): awm_paper,
    ("awm_loss", "Flow-Factory"): awm_flow_factory,
    ("dgpo_loss", "Flow-Factory"): dgpo,
    ("crd_loss", "Flow-Factory"): crd,
    ("sft_loss", "flow_grpo"): sft,
    ("distill_fm_mse", "verl-omni"): distill,
}
