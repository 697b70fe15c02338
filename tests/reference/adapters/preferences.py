"""Pairs, and losses of pairs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.algorithms.dpo import implicit_reward
from rlalign.algorithms.losses import mean_square
from rlalign.algorithms.pairs import Pairs, marks, pair_loss

from ..cases import Adapter, Case, Outputs
from .losses import Groups


def dpo_loss(case: Case) -> Outputs:
    """β is named differently everywhere, and diffusers' h lacks the factor ½. Rows i and j of a pair get a group."""
    inputs, params = case.inputs, case.params
    output = inputs["model_output"].requires_grad_()
    target, sign = inputs["noise"] - inputs["latents"], 2 * inputs["is_chosen"] - 1
    adjacent = str(params["layout"]).startswith("adjacent")
    number = torch.arange(len(sign))
    pairs = Pairs.of(number // 2 if adjacent else number % (len(sign) // 2), sign)
    beta: float = next(params[name] for name in ("beta", "beta_dpo", "dpo_beta") if name in params)
    own, reference = (-mean_square(v - target) for v in (output, inputs["ref_model_output"]))
    h = pairs.margin(implicit_reward(own, reference, beta, half=case.source != "diffusers"))
    loss = pair_loss(h, "sigmoid", beta).mean()
    (gradient,) = torch.autograd.grad(loss, output)
    return {"loss": loss, "grad_model_output": gradient}


def best_and_worst(case: Case, values: Tensor, ids: Sequence[int]) -> Tensor:
    """[groups, 2] rows, groups in the order of ``ids``."""
    prompts = case.inputs["prompt_id"]
    groups = Groups(prompts)
    mark = groups.unpack(marks(groups.pack(values), groups.valid, "best_worst"))
    rows = [[int(((mark == side) & (prompts == i)).nonzero()) for side in (1, -1)] for i in ids]
    return torch.tensor(rows)


def pairs_flow_factory(case: Case) -> Outputs:
    ids: list[Any] = case.inputs["prompt_id"].unique().tolist()
    return {"pairs": best_and_worst(case, case.inputs["advantages"], ids)}


def pairs_verl(case: Case) -> Outputs:
    """Groups in the order in which they are first seen."""
    ids: list[Any] = list(dict.fromkeys(case.inputs["prompt_id"].tolist()))
    return {"selected_indices": best_and_worst(case, case.inputs["rewards"], ids).flatten()}


KERNELS: dict[tuple[str, str], Adapter] = {
    **{("dpo_loss", source): dpo_loss for source in ("flow_grpo", "Flow-Factory", "verl-omni", "diffusers")},
    ("dpo_pairs", "Flow-Factory"): pairs_flow_factory,
    ("dpo_pairs", "verl-omni"): pairs_verl,
}
