"""Advantages, losses and averages."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlalign import ema
from rlalign.algorithms import advantages as adv
from rlalign.algorithms.advantages import Std
from rlalign.algorithms.baselines import Tracker
from rlalign.algorithms.losses import KlForm, clipped_policy_loss, divergence, ratio
from rlalign.algorithms.nft import AdvantageMode, Config, branch_losses, optimality
from rlalign.mdp.prediction import Prediction, from_network
from rlalign.mdp.transition import Gaussian, flow_sde
from rlalign.policy import Step
from rlalign.types import Level, Schedule

from ..cases import Adapter, Case, NotImplementedCase, Outputs

# --- advantages: the public code has flat lists with a prompt id each; ours are groups [P, G], ragged ones masked


class Groups:
    """Rows of equal prompt id side by side."""

    def __init__(self, ids: Tensor) -> None:
        names, group = ids.unique(return_inverse=True)
        slot = torch.stack([(group[:i] == g).sum() for i, g in enumerate(group)])
        self.place = (group, slot)
        self.shape = (len(names), int(slot.max()) + 1)
        self.valid = self.pack(torch.ones_like(ids, dtype=torch.bool))

    def pack(self, values: Tensor) -> Tensor:
        """[N] -> [P, G]."""
        return values.new_zeros(self.shape).index_put(self.place, values)

    def unpack(self, values: Tensor) -> Tensor:
        """[P, G] -> [N]."""
        return values[self.place]


def by_column(values: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """A column for every trained step, each on its own."""
    return compute(values) if values.ndim == 1 else torch.stack([compute(column) for column in values.unbind(1)], 1)


def advantage_tracker(case: Case) -> Outputs:
    """flow_grpo's PerPromptStatTracker, DiffusionNFT's copy of it."""
    rewards, groups, params = case.inputs["rewards"], Groups(case.inputs["prompt_id"]), case.params
    normalize = adv.global_std if params["global_std"] else adv.group_std
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "grpo": lambda r: normalize(r, groups.valid, Std(delta=1e-4)),
        "sft": lambda r: adv.pareto_front([r], groups.valid).to(r),
        "dpo": lambda r: best_and_worst(r, groups.valid),
    }
    kind = kinds[params["type"]]
    computed: Outputs = {"advantages": by_column(rewards, lambda r: groups.unpack(kind(groups.pack(r))))}
    return computed | tracker_statistics(rewards, groups)


def best_and_worst(rewards: Tensor, valid: Tensor) -> Tensor:
    """+1 for the best and -1 for the worst of a group. Of equal rewards flow_grpo takes the second and the first."""
    chosen = adv.extremes(rewards, valid, 1) * adv.center(rewards, valid).sign()
    equal = adv.flat(rewards, valid)
    chosen[equal, :2] = chosen.new_tensor([-1.0, 1.0])
    return chosen


def tracker_statistics(rewards: Tensor, groups: Groups) -> Outputs:
    """What the tracker reports beside the advantages: (rows a prompt, prompts seen), spread, best shares."""
    packed = groups.pack(rewards if rewards.ndim == 1 else rewards[:, 0])
    spread = adv.moments(packed, groups.valid, [1])[1]
    rows = [packed[p][groups.valid[p]].numpy() for p in range(groups.shape[0])]
    columns = 1 if rewards.ndim == 1 else rewards.shape[1]
    best = [[top_mean(np.repeat(row, columns), share) for row in rows] for share in (100, 75, 50, 25, 10)]
    return {
        "stats": [len(rewards) / len(rows), len(rows)],
        "zero_std_ratio": adv.flat(packed, groups.valid).double().mean(),
        "mean_group_std": spread.mean(),
        "mean_of_top_rewards_100_75_50_25_10": np.mean(best, axis=1),
    }


def top_mean(rewards: np.ndarray, share: float) -> float:
    return (
        float(rewards[rewards >= np.percentile(rewards, 100 - share)].mean()) if share < 100 else float(rewards.mean())
    )


def advantage_running(case: Case) -> Outputs:
    """ddpo-pytorch: one update a row, each reward a group of its own."""
    tracker = Tracker(case.params["buffer_size"], case.params["min_count"])
    rows = zip(case.inputs["prompt_id"], case.inputs["rewards"], strict=True)
    computed = [
        tracker.advantages([str(int(i)) for i in ids], r[:, None], torch.ones(len(r), 1, dtype=torch.bool))[:, 0]
        for ids, r in rows
    ]
    return {"advantages": torch.stack(computed)}


def verl_advantages(case: Case, global_std: bool, normalize: bool, delta: float) -> Tensor:
    """Rewards (N, T) count as N T numbers: a group's T columns stand side by side. A group of one has advantage 0."""
    rewards = case.inputs["rewards"]
    columns = rewards.reshape(len(rewards), -1)
    groups = Groups(case.inputs["prompt_id"].repeat_interleave(columns.shape[1]))
    packed, std = groups.pack(columns.flatten()), Std(unbiased=True, delta=delta)
    kind = adv.global_std if global_std else adv.group_std
    computed = kind(packed, groups.valid, std) if normalize else adv.center(packed, groups.valid)
    return groups.unpack(computed).reshape(rewards.shape)


def advantage_verl(case: Case) -> Outputs:
    p = case.params
    return {"advantages": verl_advantages(case, p["global_std"], p["norm_adv_by_std_in_grpo"], p["epsilon"])}


def named_rewards(case: Case, groups: Groups) -> tuple[list[Tensor], list[float]]:
    names = sorted(name.removeprefix("reward_") for name in case.inputs if name.startswith("reward_"))
    weights: dict[str, float] = case.params.get("weights") or dict.fromkeys(names, 1.0)
    return [groups.pack(case.inputs[f"reward_{name}"]) for name in names], [weights[name] for name in names]


def advantage_flow_factory(case: Case) -> Outputs:
    groups, std = Groups(case.inputs["prompt_id"]), Std(delta=0.0, floor=1e-6)
    rewards, weights = named_rewards(case, groups)
    if case.params["aggregation"] == "gdpo":
        return {"advantages": groups.unpack(adv.gdpo(rewards, weights, groups.valid, std))}
    kind = adv.global_std if case.params["global_std"] else adv.group_std
    return {"advantages": groups.unpack(kind(weighted_sum(rewards, weights), groups.valid, std))}


def weighted_sum(rewards: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([w * r for r, w in zip(rewards, weights, strict=True)]).sum(0)


def advantage_dance(case: Case) -> Outputs:
    """Groups are contiguous runs of num_generations."""
    rewards = case.inputs["rewards"]
    packed = rewards.reshape(-1, case.params["num_generations"])
    kind = adv.group_std if case.params["use_group"] else adv.batch
    computed = kind(packed, torch.ones_like(packed, dtype=torch.bool), Std(unbiased=True, delta=1e-8))
    return {"advantages": computed.reshape(rewards.shape)}


def advantage_mix(case: Case) -> Outputs:
    rows = len(case.inputs["prompt_id"])
    groups = Groups(torch.arange(rows) // case.params["num_generations"])
    rewards, weights = named_rewards(case, groups)
    std, trim = Std(unbiased=True, delta=1e-8), case.params["trimmed_ratio"]
    if case.params["multi_reward_mix"] == "advantage_aggr":
        computed = adv.advantage_aggr(rewards, weights, groups.valid, std, trim)
    else:
        computed = adv.group_std(weighted_sum(rewards, weights), groups.valid, std, trim)
    return {"advantages": groups.unpack(computed)}


def reward_prob(case: Case) -> Outputs:
    p = case.params
    computed = verl_advantages(case, p["global_std"], p["norm_by_std"], 1e-4)
    modes: tuple[AdvantageMode, ...] = ("all", "positive_only", "negative_only", "one_only", "binary")
    return {
        "advantages": computed,
        **{f"reward_prob_{mode}": optimality(computed, p["adv_clip_max"], mode) for mode in modes},
    }


# --- trajectory losses


def leaves(case: Case, *names: str) -> Iterator[Tensor]:
    """Inputs that gradients are asked for."""
    inputs = case.inputs
    return (inputs[name].requires_grad_() for name in names)


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)
    return torch.zeros_like(of) if grad is None else grad


def clip_range(params: dict[str, Any]) -> tuple[float, float]:
    """How far below and above 1; Flow-Factory gives both, signed."""
    given = params["clip_range"] if "clip_range" in params else params["clip_ratio"]
    return (-given[0], given[1]) if isinstance(given, list) else (given, given)


def clamped_advantages(case: Case) -> Tensor:
    bound = case.params.get("adv_clip_range") or (-case.params["adv_clip_max"], case.params["adv_clip_max"])
    return case.inputs["advantages"].clamp(*bound)


def policy_loss(case: Case, log_prob: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over rows, and the ratios."""
    rho = ratio(log_prob, case.inputs["old_log_prob"])
    return clipped_policy_loss(rho, clamped_advantages(case), *clip_range(case.params)).mean(), rho


def ppo_loss(case: Case) -> Outputs:
    """DanceGRPO divides by accumulation and steps within; rlalign's learner does so outside."""
    (log_prob,) = leaves(case, "log_prob")
    loss, rho = policy_loss(case, log_prob)
    loss = loss / (case.params.get("gradient_accumulation_steps", 1) * case.params.get("train_timesteps", 1))
    return {"loss": loss, "ratio": rho, "grad_log_prob": gradient(loss, log_prob)}


def grpo_end_to_end(case: Case) -> Outputs:
    inputs, params = case.inputs, case.params
    output = inputs["model_output"].requires_grad_()
    schedule = Schedule(1 - inputs["sigmas"], inputs["sigmas"], inputs["sigmas"])
    x, at = inputs["sample"], inputs["step_index"]
    now, nxt = schedule.level(at, x), schedule.level(at + 1, x)

    def step(network: Tensor) -> Step:
        prediction = from_network("velocity", network, x, now)
        return Step(flow_sde(x, prediction, now, nxt, params["noise_level"]), prediction, now, nxt)

    policy, reference = step(output), step(inputs["ref_model_output"])
    log_prob = policy.gaussian.log_prob(inputs["prev_sample"], "mean")
    first, rho = policy_loss(case, log_prob)
    kl = divergence("no_tau", policy, reference).mean()
    loss = first + params["beta"] * kl
    return {
        "loss": loss,
        "policy_loss": first,
        "kl_loss": kl,
        "ratio": rho,
        "log_prob": log_prob,
        "grad_model_output": gradient(loss, output),
    }


def bare_step(mean: Tensor, std: Tensor, velocity: Tensor, tau: Tensor) -> Step:
    """A step of which only these are known."""
    now, nxt = Level(1 - tau, tau, tau), Level(torch.ones_like(tau), torch.zeros_like(tau), tau)
    return Step(Gaussian(mean, std), Prediction(torch.zeros_like(velocity), velocity), now, nxt)


def grpo_kl_loss(case: Case) -> Outputs:
    forms: dict[str, KlForm] = {"v-based": "velocity", "x-based": "mean_sq"}
    log_prob, output, mean = leaves(case, "log_prob", "model_output", "mean")
    tau = -case.inputs["dt"]
    std = case.inputs["std_dev"] * tau.sqrt()
    policy = bare_step(mean, std, output, tau)
    reference = bare_step(case.inputs["ref_mean"], std, case.inputs["ref_model_output"], tau)
    first, rho = policy_loss(case, log_prob)
    kl = divergence(forms[case.params["kl_type"]], policy, reference).mean()
    loss = first + case.params["kl_beta"] * kl
    return {
        "loss": loss,
        "ratio": rho,
        "kl_div": kl,
        "grad_log_prob": gradient(loss, log_prob),
        "grad_model_output": gradient(loss, output),
        "grad_mean": gradient(loss, mean),
    }


def kl_loss(case: Case) -> Outputs:
    """The std given lacks the square root of tau, which is not given: the divergence of steps with tau = 1."""
    (mean,) = leaves(case, "prev_sample_mean")
    std = case.inputs["std_dev_t"]
    tau = torch.ones_like(std)
    policy, reference = bare_step(mean, std, mean, tau), bare_step(case.inputs["ref"], std, mean, tau)
    loss = divergence("no_tau", policy, reference).mean()
    return {"loss": loss, "grad_prev_sample_mean": gradient(loss, mean)}


# --- forward-process losses


def nft(case: Case, rho: Tensor, beta: float, bound: float, kl_weight: float) -> Outputs:
    (output,) = leaves(case, "model_output")
    x0, x_t, t, v_old = (case.inputs[name] for name in ("x0", "xt", "t", "old_model_output"))
    positive, negative = branch_losses(x0, x_t, t, output, v_old, beta, "adaptive")
    first = (bound * (rho * positive + (1 - rho) * negative) / beta).mean()
    loss = first + kl_weight * (output - case.inputs["ref_model_output"]).square().mean()
    return {"loss": loss, "policy_loss": first, "grad_model_output": gradient(loss, output)}


def nft_paper(case: Case) -> Outputs:
    p = case.params
    rho = optimality(case.inputs["advantages"], p["adv_clip_max"], p.get("adv_mode", "all"))
    return nft(case, rho, p["beta"], p["adv_clip_max"], p["train_beta"])


def nft_flow_factory(case: Case) -> Outputs:
    p = case.params
    rho = optimality(case.inputs["advantages"], p["adv_clip_range"][1])
    return nft(case, rho, p["nft_beta"], p["adv_clip_range"][1], p["kl_beta"])


def nft_verl(case: Case) -> Outputs:
    """Its advantages are optimality probabilities already."""
    p = case.params
    return nft(case, case.inputs["advantages"], p["mix_beta"], p["adv_clip_max"], p["ref_kl_coef"])


# --- averages of weights


def decays(case: Case, rule: Callable[[int], float]) -> Outputs:
    return {"decay": [rule(step) for step in case.inputs["step"].tolist()]}


def decay_nft(case: Case) -> Outputs:
    return decays(case, Config(old_decay=case.params["decay_type"]).decay)


def decay_awm(case: Case) -> Outputs:
    top = case.params["kl_ema_decay"]
    linear = case.params["kl_ema_decay_type"] == "linear"
    return decays(case, (lambda t: ema.ramp(t, 0, 0.001, top)) if linear else (lambda t: top))


def decay_flow_factory(case: Case) -> Outputs:
    p = case.params
    if "slope" in p:
        return decays(case, lambda t: ema.ramp(t, p["start_step"], p["slope"], p["end_value"], p["start_value"]))
    return decays(case, flow_factory_rule(p))


def flow_factory_rule(p: dict[str, Any]) -> Callable[[int], float]:
    top = p["decay"]
    start, warmup, total = p.get("initial_decay", 0.0), p.get("warmup_steps", 10), p.get("total_steps", 1000)
    rules: dict[str, Callable[[int], float]] = {
        "constant": lambda t: top,
        "power": lambda t: ema.power(t, top, warmup),
        "linear": lambda t: ema.ramp(t, 0, (top - start) / warmup, top, start),
        "piecewise_linear": lambda t: ema.ramp(t, p.get("flat_steps", 0), p.get("ramp_rate", 0.001), top),
        "cosine": lambda t: ema.cosine(t, start, top, total),
        "warmup_cosine": lambda t: ema.warmup_cosine(t, start, top, warmup, total),
    }
    if p["schedule_type"] not in rules:
        raise NotImplementedCase(f"schedule {p['schedule_type']}")
    return rules[p["schedule_type"]]


def averaged(case: Case, rule: Callable[[int], float]) -> Outputs:
    """After step t = 0.. the copy follows when (t + 1) is a multiple of the interval."""
    first, *later = case.inputs["params"]
    copies, seen, every = {"w": first.clone()}, [], case.params["update_step_interval"]
    for t, weights in enumerate(later):
        if (t + 1) % every == 0:
            ema.blend_(copies, {"w": single_product(weights, 1 - rule(t))}, rule(t))
        seen.append(copies["w"].clone())
    return {"ema": torch.stack(seen)}


def single_product(weights: Tensor, share: float) -> Tensor:
    """The weights for which share * weights is what float32 makes of it: so the cases' double precision is computed."""
    return (weights.float() * share).to(weights.dtype) / share


def ema_flow_grpo(case: Case) -> Outputs:
    """The decay is not among the parameters of the case, only in its name."""
    decay = case.params.get("decay") or float(str(case.meta["case"]).removeprefix("decay").split("_")[0])
    return averaged(case, lambda t: ema.power(t, decay))


def ema_flow_factory(case: Case) -> Outputs:
    """piecewise_linear; its settings are not in the case but were read off its numbers: flat 5, rate 0.05, top 0.5."""
    if not str(case.meta["case"]).startswith("piecewise"):
        raise NotImplementedCase("the case does not say its schedule")
    given = {"flat_steps": 5, "ramp_rate": 0.05, "decay": 0.5, "schedule_type": "piecewise_linear"} | case.params
    return averaged(case, flow_factory_rule(given))


KERNELS: dict[tuple[str, str], Adapter] = {
    ("advantage", "flow_grpo"): advantage_tracker,
    ("advantage", "DiffusionNFT"): advantage_tracker,
    ("advantage", "ddpo-pytorch"): advantage_running,
    ("advantage", "verl-omni"): advantage_verl,
    ("advantage", "Flow-Factory"): advantage_flow_factory,
    ("advantage", "DanceGRPO"): advantage_dance,
    ("advantage", "MixGRPO"): advantage_mix,
    ("reward_prob", "verl-omni"): reward_prob,
    **{
        ("ppo_loss", source): ppo_loss
        for source in ("ddpo-pytorch", "trl", "flow_grpo", "verl-omni", "DanceGRPO", "Flow-Factory")
    },
    ("grpo_end_to_end", "flow_grpo"): grpo_end_to_end,
    ("grpo_kl_loss", "Flow-Factory"): grpo_kl_loss,
    ("kl_loss", "verl-omni"): kl_loss,
    ("nft_loss", "DiffusionNFT"): nft_paper,
    ("nft_loss", "Flow-Factory"): nft_flow_factory,
    ("nft_loss", "verl-omni"): nft_verl,
    ("ema_decay", "DiffusionNFT"): decay_nft,
    ("ema_decay", "AWM"): decay_awm,
    ("ema_decay", "Flow-Factory"): decay_flow_factory,
    ("ema_update", "flow_grpo"): ema_flow_grpo,
    ("ema_update", "Flow-Factory"): ema_flow_factory,
}
