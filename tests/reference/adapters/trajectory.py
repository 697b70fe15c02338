"""Adapters of the trajectory algorithms."""

import torch
from torch import Tensor

from rlalign.algorithms.losses import clipped_policy_loss, guarded_ratio, ratio, trusted
from rlalign.mdp.transition import Gaussian

from ..cases import Adapter, Case, Outputs
from .losses import clamped_advantages, clip_range, gradient, leaves


def divergence_to_old(mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """[B], a mean over elements; std is the whole one of the step."""
    return Gaussian(mean, std).kl(Gaussian(old_mean, std), "mean")


def guard(case: Case, mean: str, old_mean: str, std: Tensor) -> tuple[Tensor, Outputs]:
    log_prob, moved = leaves(case, "log_prob", mean)
    distance = divergence_to_old(moved, case.inputs[old_mean], std)
    rho = guarded_ratio(log_prob, case.inputs["old_log_prob"], distance, std.flatten())
    loss = clipped_policy_loss(rho, clamped_advantages(case), *clip_range(case.params)).mean()
    return rho, {"loss": loss, "grad_log_prob": gradient(loss, log_prob), f"grad_{mean}": gradient(loss, moved)}


def guard_verl(case: Case) -> Outputs:
    """One std and one τ for all; the loss is divided by τ, which is a factor of everything here."""
    root = case.inputs["sqrt_dt"].mean()
    std = (root * case.inputs["std_dev_t"].mean()).expand_as(case.inputs["std_dev_t"])
    _, outputs = guard(case, "prev_sample_mean", "old_prev_sample_mean", std)
    return {name: value / root.square() for name, value in outputs.items()}


def guard_flow_factory(case: Case) -> Outputs:
    """No 1/τ. Its ratio is broadcast to every pair of rows, which are all of one step: our row once for each."""
    std = case.inputs["std_dev"] * (-case.inputs["dt"]).sqrt()
    rho, outputs = guard(case, "mean", "old_mean", std)
    silent = case.inputs["model_output"] * 0.0  # no penalty reaches it
    return outputs | {"ratio": rho.repeat(len(rho)), "grad_model_output": silent}


def flow_dppo(case: Case) -> Outputs:
    """Only the ratio has a gradient; the divergence decides and is not differentiated."""
    (log_prob,) = leaves(case, "log_prob")
    given, advantages = case.inputs, case.inputs["advantages"]
    std = given["std_dev_t"] * given["sqrt_dt"].reshape(-1, 1, 1)
    if not case.params["add_kl_coefficient"]:
        std = torch.ones_like(std)
    distance = divergence_to_old(given["prev_sample_mean"], given["old_prev_sample_mean"], std)
    rho = ratio(log_prob, given["old_log_prob"])
    mask = trusted(distance, rho.detach(), advantages, case.params["kl_mask_threshold"])
    loss = (-mask * advantages * rho).mean()
    return {
        "loss": loss,
        "grad_log_prob": gradient(loss, log_prob),
        "grad_prev_sample_mean": given["prev_sample_mean"] * 0.0,
    }


KERNELS: dict[tuple[str, str], Adapter] = {
    ("grpo_guard", "verl-omni"): guard_verl,
    ("grpo_guard", "Flow-Factory"): guard_flow_factory,
    ("flow_dppo", "verl-omni"): flow_dppo,
}
