"""Kernels, solvers, grids, windows and whole rollouts."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import torch
from torch import Tensor

from rlalign.mdp.prediction import Prediction, from_network
from rlalign.mdp.rollout import rollout
from rlalign.mdp.schedule import (
    compressed_tail_sigmas,
    diffusers_dynamic_sigmas,
    diffusers_static_sigmas,
    dynamic_mu,
    exponential_hold,
    flow_schedule,
    linear_hold,
    moving_window,
    plain_sigmas,
)
from rlalign.mdp.solvers import SOLVERS, History, dpmpp_3m, euler, extrapolate_twice, slope_and_bend
from rlalign.mdp.transition import KERNELS as TRANSITIONS
from rlalign.mdp.transition import Gaussian, dance_sde, ddim, ddpm, flow_sde, unscaled_log_prob
from rlalign.models.base import classifier_free_guidance
from rlalign.types import Level, Schedule

from ..cases import Adapter, Case, NotImplementedCase, OutOfScopeCase, Outputs

LogProb = Callable[[Gaussian, Tensor], Tensor]


def log_prob(gaussian: Gaussian, x: Tensor) -> Tensor:
    """[B], NaN in the rows that rlalign refuses."""
    std = gaussian.std.expand(len(x), *[1] * (x.ndim - 1))
    return torch.cat([_row_log_prob(Gaussian(gaussian.mean[b, None], std[b, None]), x[b, None]) for b in range(len(x))])


def _row_log_prob(gaussian: Gaussian, x: Tensor) -> Tensor:
    try:
        density = gaussian.log_prob(x, "mean")
    except ValueError:
        return math.nan * gaussian.mean.flatten(1).sum(1)  # its gradient is refused too
    assert density.isfinite().all() or not gaussian.mean.isfinite().all(), "neither a density nor a refusal"
    return density


def without_normaliser(gaussian: Gaussian, x: Tensor) -> Tensor:
    """MixGRPO's and DiffusionNFT's Dance step lose the normaliser; verl-omni can leave it out."""
    return log_prob(gaussian, x) - log_prob(gaussian, gaussian.mean)


def zero(gaussian: Gaussian, x: Tensor) -> Tensor:
    return x.new_zeros(len(x))


LOG_PROBS: dict[str, LogProb] = {
    "gauss": log_prob,
    "gauss_nonorm": without_normaliser,
    "sq": unscaled_log_prob,
    "zero": zero,
}


# One step of a kernel


def step(name: str, std_holds_tau: bool = True, silent_ode: bool = False) -> Adapter:
    """Cases of one step on the flow path; what a returned std means depends on the source."""

    def adapter(case: Case) -> Outputs:
        given = case.inputs
        x, output = given["sample"], given["model_output"].requires_grad_()
        now, nxt = _flow_levels(given, x)
        prediction = from_network("velocity", output, x, now)
        gaussian = _gaussian(name, case, x, prediction, now, nxt)
        x_next = gaussian.sample(given["noise"])
        if case.params.get("deterministic"):  # the density stays that of the stochastic step
            x_next, _ = euler(x, prediction, now, nxt, None)
        if silent_ode and not case.params.get("sde_solver", True):
            x_next = gaussian.mean
        tau = now.sigma - nxt.sigma
        std = gaussian.std if std_holds_tau else gaussian.std / tau.sqrt()
        known = {
            "pred_original_sample": prediction.x0,
            "std_returned": std.expand_as(tau),
            "dt": -tau,
            "sqrt_dt": tau.sqrt().flatten(),
        }
        return _scored(case, gaussian, x_next, output, LOG_PROBS[case.params["logp"]]) | _as_expected(case, known)

    return adapter


def _gaussian(name: str, case: Case, x: Tensor, prediction: Prediction, now: Level, nxt: Level) -> Gaussian:
    level = case.inputs["noise_level"]
    noise_level = _over(level, x) if level.ndim else level.item()
    gaussian = TRANSITIONS[name](x, prediction, now, nxt, noise_level)
    if name == "dance_sde" and not case.params.get("sde_solver", True):  # Euler's mean with Dance-SDE's noise
        return Gaussian(euler(x, prediction, now, nxt, None)[0], gaussian.std)
    return gaussian


def _flow_levels(given: dict[str, Tensor], x: Tensor) -> tuple[Level, Level]:
    now, nxt = _over(given["sigma"], x), _over(given["sigma_next"], x)
    interior = given["sigmas"][1]
    return Level(1 - now, now, interior), Level(1 - nxt, nxt, interior)


def _over(rows: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to broadcast against x."""
    return rows.to(x).reshape(-1, *[1] * (x.ndim - 1))


def _scored(case: Case, gaussian: Gaussian, x_next: Tensor, output: Tensor, score: LogProb) -> Outputs:
    """Sample, mean, densities and the gradient that every step case asks for."""
    given = case.inputs
    outputs: Outputs = {
        "prev_sample": x_next,
        "prev_sample_mean": gaussian.mean,
        "log_prob": score(gaussian, x_next),
    }
    if "log_prob_given" in case.native:
        outputs["log_prob_given"] = score(gaussian, given["prev_sample_given"])
    if "grad_model_output" in case.native:
        weighted = (given["logp_weight"] * outputs["log_prob_given"]).sum()
        (outputs["grad_model_output"],) = torch.autograd.grad(weighted, output)
    return outputs


def _as_expected(case: Case, known: dict[str, Tensor]) -> Outputs:
    """Values that a source returns once for the whole batch (shape []) or once a row."""
    wanted = {name: value for name, value in known.items() if name in case.native}
    return {name: value if case.native[name].ndim else value.flatten()[0] for name, value in wanted.items()}


def flow_ddim_step(case: Case) -> Outputs:
    given = case.inputs
    x, output = given["sample"], given["model_output"].requires_grad_()
    schedule = flow_schedule(given["sigmas"], case.dtype)
    now, nxt = (schedule.level(case.params["step_index"] + end, x) for end in (0, 1))
    prediction = from_network("velocity", output, x, now)
    gaussian = ddim(x, prediction, now, nxt, case.params["eta"])
    scored = _scored(case, gaussian, gaussian.sample(given["noise"]), output, log_prob)
    return scored | {"pred_original_sample": prediction.x0}


def ddim_step(case: Case) -> Outputs:
    """The whole table of levels serves as a schedule whose steps are its times."""
    given = case.inputs
    x, output = given["sample"], given["model_output"].requires_grad_()
    table = given["alphas_cumprod"]
    schedule = Schedule(table.sqrt(), (1 - table).sqrt(), torch.arange(len(table)).float())
    now, nxt = schedule.level(given["timestep"], x), schedule.level(given["prev_timestep"], x)
    prediction = from_network(case.params["prediction_type"], output, x, now)
    config = case.params["scheduler_config"]
    if config.get("thresholding"):
        raise NotImplementedCase("thresholding")
    if config.get("clip_sample"):
        bound = config.get("clip_sample_range", 1.0)
        prediction = Prediction(prediction.x0.clamp(-bound, bound), prediction.eps)
    if case.params.get("use_clipped_model_output"):
        prediction = from_network("sample", prediction.x0, x, now)
    gaussian = ddim(x, prediction, now, nxt, case.params["eta"])
    scored = _scored(case, gaussian, gaussian.sample(given["noise"]), output, log_prob)
    return scored | {"std_dev": gaussian.std.flatten()}


# Trajectories


def dpmpp_by_hand(case: Case) -> Outputs:
    """MixGRPO: the solver's clean latent in the mean of stochastic steps too, and its history kept across them."""
    order = _dpmpp_order(case)
    given, x = case.inputs, case.inputs["latents0"]
    schedule = flow_schedule(given["sigmas"], case.dtype)
    latents, originals, log_probs = [x], [], []
    history: History | None = None
    for k in range(schedule.num_steps):
        now, nxt = schedule.level(k, x), schedule.level(k + 1, x)
        prediction = from_network("velocity", _toy_velocity(given, x, now.sigma), x, now)
        if history and (order < 3 or (k == schedule.num_steps - 2 and schedule.num_steps < 15)):
            history = replace(history, before=None)  # no third order in the last step but one of a short chain
        clean = extrapolate_twice(prediction, now, nxt, history, stretch=2.0)
        if history and history.before and k < schedule.num_steps - 1:
            bend = slope_and_bend(prediction, now, nxt, history, history.before)[1]
            clean = clean + _wrong_bend(now, nxt) * bend
        gaussian = ddpm(x, from_network("sample", clean, x, now), now, nxt, 0.0)
        solved, remembered = dpmpp_3m(x, prediction, now, nxt, history)
        history = remembered if order > 1 else None
        x = gaussian.sample(given["noise"][k]) if case.params["sde_steps"][k] else solved
        latents.append(x)
        originals.append(prediction.x0)
        log_probs.append(log_prob(gaussian, x))  # in deterministic steps that of the stochastic step
    return {
        "latents": torch.stack(latents),
        "pred_original": torch.stack(originals),
        "log_probs": torch.stack(log_probs),
    }


def _wrong_bend(now: Level, nxt: Level) -> Tensor:
    """What MixGRPO's clean latent has too much of D2: it takes half of it, with - 1/2 for + 1/2 in its factor."""
    kept = (now.alpha * nxt.sigma / (nxt.alpha * now.sigma)).square()
    reach = -kept.log()
    factor = (1 - kept - reach) / reach.square()
    return ((factor - 0.5) / 2 - (factor + 0.5)) / (1 - kept)


def dpmpp_rollout(case: Case) -> Outputs:
    """DiffusionNFT: deterministic throughout; log-probabilities are not defined and stored as 0."""
    order = _dpmpp_order(case)
    if any(case.params["sde_steps"]):
        raise NotImplementedCase("DiffusionNFT's stochastic multistep")
    given, x = case.inputs, case.inputs["latents0"]
    schedule = flow_schedule(given["sigmas"], case.dtype)
    latents, originals = [], []

    def predict(state: Tensor, k: int) -> Prediction:
        level = schedule.level(k, state)
        prediction = from_network("velocity", _toy_velocity(given, state, level.sigma), state, level)
        latents.append(state)
        originals.append(prediction.x0)
        return prediction

    stochastic = torch.zeros(len(x), schedule.num_steps, dtype=torch.bool)
    kept = torch.zeros(len(x), 0, dtype=torch.int64)
    solver = SOLVERS[("euler", "dpmpp_2m", "dpmpp_3m")[order - 1]]
    chain = rollout(predict, x, schedule, stochastic, kept, _never, solver, _never, _never)
    return {
        "latents": torch.stack([*latents, chain.final]),
        "pred_original": torch.stack(originals),
        "log_probs": x.new_zeros(schedule.num_steps, len(x)),
    }


def _never(*_: object) -> NoReturn:
    raise AssertionError("a deterministic rollout draws and scores nothing")


def _dpmpp_order(case: Case) -> int:
    order, kind = case.params["order"], case.params.get("solver_type", "midpoint")
    if kind != "midpoint":
        raise NotImplementedCase(f"order {order}, {kind}")
    return order


def _toy_velocity(given: dict[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
    """v(x, s) = (A x)(1 - 0.5 s) + b s over channel dim 1."""
    bias = given["b"].reshape(-1, *[1] * (x.ndim - 2))
    return torch.einsum("cd,bd...->bc...", given["A"], x) * (1 - 0.5 * sigma) + bias * sigma


def flow_grpo_rollout(case: Case) -> Outputs:
    """The net is told the timestep; every step is stochastic, the last too."""
    given, x = case.inputs, case.inputs["latents0"]
    scale = case.params["guidance_scale"]

    def velocity(state: Tensor, k: int) -> Tensor:
        t = given["timesteps"][k] / 1000
        shared = torch.einsum("cd,bd...->bc...", given["A"], state) * (1 - 0.5 * t) + _channels(given["b"] * t, state)
        positive = shared + _channels(given["pooled"] @ given["C"].T, state)
        if scale <= 1:
            return positive
        negative = shared + _channels(given["negative_pooled"] @ given["C"].T, state)
        return classifier_free_guidance(positive, negative, scale)

    def kernel(state: Tensor, prediction: Prediction, now: Level, nxt: Level) -> Gaussian:
        return flow_sde(state, prediction, now, nxt, case.params["noise_level"])

    latents, log_probs = _toy_rollout(case, x, velocity, kernel, range(len(given["sigmas"]) - 1), log_prob)
    return {
        "latents": torch.stack(latents),
        "log_probs": log_probs.T,
        "network_timesteps": given["timesteps"][:, None],
    }


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """[C] or [B, C] -> broadcasting against x [B, C, ...]."""
    return values.reshape(*values.shape, *[1] * (x.ndim - 2))


def dance_rollout(score: LogProb) -> Adapter:
    """DanceGRPO, and MixGRPO with a window: the net is told int(1000 sigma)/1000."""

    def adapter(case: Case) -> Outputs:
        given, x = case.inputs, case.inputs["latents0"]
        flow = case.params.get("flow_grpo_sampling", False)
        schedule = flow_schedule(given["sigmas"], case.dtype)
        told = schedule.time[:-1].trunc().to(case.dtype)

        def velocity(state: Tensor, k: int) -> Tensor:
            u = told[k] / 1000
            pooled = (given["pooled"] @ given["C"].T)[:, None]
            return state @ given["A"].T * (1 - 0.5 * u) + given["b"] * u + pooled

        def kernel(state: Tensor, prediction: Prediction, now: Level, nxt: Level) -> Gaussian:
            return (flow_sde if flow else dance_sde)(state, prediction, now, nxt, case.params["eta"])

        window = case.params.get("window")
        steps = range(*window) if window else range(schedule.num_steps)
        latents, log_probs = _toy_rollout(case, x, velocity, kernel, steps, log_prob if flow else score)
        if flow:  # deterministic steps have the density of the stochastic step there
            log_probs = torch.stack([_density(schedule, velocity, kernel, k, latents) for k in range(len(told))], 1)
        return {
            "latents": torch.stack(latents, 1),
            "log_probs": log_probs,
            "network_timesteps": told[:, None] / 1000,
        }

    return adapter


def _density(
    schedule: Schedule,
    velocity: Callable[[Tensor, int], Tensor],
    kernel: Callable[[Tensor, Prediction, Level, Level], Gaussian],
    k: int,
    states: list[Tensor],
) -> Tensor:
    x, now, nxt = states[k], schedule.level(k, states[k]), schedule.level(k + 1, states[k])
    prediction = from_network("velocity", velocity(x, k), x, now)
    return log_prob(kernel(x, prediction, now, nxt), states[k + 1])


def _toy_rollout(
    case: Case,
    x: Tensor,
    velocity: Callable[[Tensor, int], Tensor],
    kernel: Callable[[Tensor, Prediction, Level, Level], Gaussian],
    steps: range,
    score: LogProb,
) -> tuple[list[Tensor], Tensor]:
    """All states, and log-probs [B, N] that are 0 in deterministic steps."""
    schedule = flow_schedule(case.inputs["sigmas"], case.dtype)
    states: list[Tensor] = []

    def predict(state: Tensor, k: int) -> Prediction:
        states.append(state)
        return from_network("velocity", velocity(state, k), state, schedule.level(k, state))

    kept = torch.tensor(list(steps)).expand(len(x), -1)
    stochastic = torch.zeros(len(x), schedule.num_steps, dtype=torch.bool)
    stochastic[:, list(steps)] = True
    noise = case.inputs["noise"]
    chain = rollout(predict, x, schedule, stochastic, kept, kernel, euler, lambda k: noise[k], score)
    log_probs = x.new_zeros(len(x), schedule.num_steps).scatter(1, kept, chain.log_probs)
    return [*states, chain.final], log_probs


# Grids and windows


def diffusers_grid(case: Case) -> Outputs:
    if "mu" in case.params:
        return dynamic_grid(case)
    return _grid(case, diffusers_static_sigmas(case.params["steps"], case.params["shift"]))


def dynamic_grid(case: Case) -> Outputs:
    tokens = case.params.get("seq_len")
    mu = case.params["mu"] if tokens is None else dynamic_mu(tokens)
    return _grid(case, diffusers_dynamic_sigmas(case.params["steps"], mu))


def plain_grid(case: Case) -> Outputs:
    return _grid(case, plain_sigmas(case.params["steps"], case.params["shift"]))


def compressed_grid(case: Case) -> Outputs:
    _, end = case.params["window"]
    ratio = case.params["dpm_post_compress_ratio"]
    try:
        return _grid(case, compressed_tail_sigmas(case.params["T"], case.params["shift"], end - 1, ratio))
    except ValueError as refusal:
        raise OutOfScopeCase(str(refusal)) from None


def _grid(case: Case, sigmas: Tensor) -> Outputs:
    sigmas = sigmas.to(case.dtype)
    return {"sigmas": sigmas, "timesteps": 1000 * sigmas[:-1]}


def mix_window(case: Case) -> Outputs:
    """MixGRPO at this commit moves once more, to an empty window, before it rolls back or stops."""
    p = case.params
    strategy, end, size = p.get("sample_strategy", "progressive"), p["max_timesteps"], p["group_size"]
    if strategy == "random":
        raise OutOfScopeCase("depends on another project's random stream")
    if p.get("cur_timestep") or p.get("cur_iter_in_group"):
        raise NotImplementedCase("a window that starts elsewhere")
    most = p["iters_per_group"]
    holds = {
        "progressive": lambda start: most,
        "decay": linear_hold(
            p.get("max_iters_per_group") or most, p.get("min_iters_per_group") or max(1, most // 4), end
        ),
        "exp_decay": exponential_hold(most, p.get("exp_decay_k", 0.1), p.get("exp_decay_thre_timestep", 13)),
    }
    stride = p.get("prog_overlap_step", 1) if p.get("prog_overlap") else size
    windows, starts = [], []
    for iteration in range(len(case.native["windows"])):
        steps = moving_window(iteration, size, end + 1, stride, holds[strategy], p.get("roll_back", False))
        inside = [k for k in steps if k < end]
        windows.append(inside + [-1] * (size - len(inside)))
        starts.append(steps.start)
    return {"windows": torch.tensor(windows), "cur_timestep": torch.tensor(starts)}


KERNELS: dict[tuple[str, str], Adapter] = {
    ("flow_sde", "flow_grpo"): step("flow_sde", std_holds_tau=False),
    ("flow_sde", "AWM"): step("flow_sde"),
    ("flow_sde", "MixGRPO"): step("flow_sde"),
    ("flow_sde", "DiffusionNFT"): step("flow_sde"),
    ("flow_sde", "Flow-Factory"): step("flow_sde", std_holds_tau=False),
    ("flow_sde", "Flow-Factory-UniPC"): step("flow_sde", std_holds_tau=False),
    ("flow_sde", "verl-omni"): step("flow_sde", std_holds_tau=False),
    ("dance_sde", "DanceGRPO"): step("dance_sde"),
    ("dance_sde", "MixGRPO"): step("dance_sde", silent_ode=True),
    ("dance_sde", "DiffusionNFT"): step("dance_sde"),
    ("dance_sde", "Flow-Factory"): step("dance_sde", std_holds_tau=False),
    ("dance_sde", "verl-omni"): step("dance_sde"),
    ("cps", "Flow-Factory"): step("cps"),
    ("cps", "Flow-Factory-UniPC"): step("cps"),
    ("cps", "verl-omni"): step("cps"),
    ("flow_ode", "Flow-Factory"): step("ode"),
    ("flow_ddim", "DiffusionNFT"): flow_ddim_step,
    ("ddim_step", "ddpo-pytorch"): ddim_step,
    ("ddim_step", "trl"): ddim_step,
    ("ddim_step", "DanceGRPO"): ddim_step,
    ("dpmpp_traj", "MixGRPO"): dpmpp_by_hand,
    ("dpmpp_traj", "DiffusionNFT"): dpmpp_rollout,
    ("sigma_schedule", "diffusers"): diffusers_grid,
    ("sigma_schedule", "DanceGRPO"): plain_grid,
    ("sigma_schedule", "Flow-Factory"): dynamic_grid,
    ("sigma_schedule", "MixGRPO"): compressed_grid,
    ("mix_window", "MixGRPO"): mix_window,
    ("rollout", "flow_grpo"): flow_grpo_rollout,
    ("rollout", "DanceGRPO"): dance_rollout(log_prob),
    ("rollout", "MixGRPO"): dance_rollout(without_normaliser),
}
