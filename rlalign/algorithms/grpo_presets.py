"""What papers set for `grpo`: overlays of a run file by name."""

from typing import Any


def _preset(
    images: tuple[int, int],
    rollout: dict[str, Any],
    algorithm: dict[str, Any],
    lr: float = 3e-4,
    lora: tuple[int, int] | None = (32, 64),
    ema: bool = False,
) -> dict[str, Any]:
    """A published recipe as blocks of a run file: images = prompts x samples of a step, lora = rank and alpha."""
    prompts, samples = images
    return {
        "rollout": {"size": (512, 512), "prompts_per_step": prompts, "samples_per_prompt": samples, **rollout},
        "algorithm": {"name": "grpo", "updates_per_step": 2, **algorithm},
        "optimizer": {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "max_grad_norm": 1.0},
        "ema": {"decay": 0.9, "every": 8} if ema else None,
        "model": {"lora": {"rank": lora[0], "alpha": lora[1]} if lora else None},
    }


def _steps(number: int, guidance: float, noise_level: float, **other: Any) -> dict[str, Any]:
    """All steps but the last are stochastic unless ``other`` has a window."""
    own = {"num_steps": number, "guidance_scale": guidance, "noise_level": noise_level}
    return {**own, "kernel": "flow_sde", "window": None, **other}


_TOLD = 1.0  # no second pass: FLUX is told its guidance, by model.guidance, whose default is the published one
_OLD: dict[str, Any] = {"last_step": "sde_untrained", "uncond_grad": False}  # flow_grpo's first pipeline
_CPS: dict[str, Any] = {"kernel": "cps", "cps_logprob": "unscaled", "window": {"size": 3, "range": (0, 5)}}
_TWO: dict[str, Any] = {"window": {"size": 2, "range": (0, 5)}}
_DANCE: dict[str, Any] = {"size": (720, 720), "shift": 3.0, "init_noise": "shared", "time_to_net": "int"}
_KL: dict[str, Any] = {"kl_weight": 0.04, "kl_form": "no_tau"}  # for GenEval and OCR; PickScore 0.01, CLIP score 0.02
_UNBIASED: dict[str, Any] = {"std_estimator": "unbiased", "zero_std_groups": "keep"}
_GROUP: dict[str, Any] = {"advantage": "group_std", "std_delta": 1e-8, **_UNBIASED}
_SLIDING: dict[str, Any] = {"size": 4, "range": "all", "schedule": "progressive", "hold": 25, "stride": 1}
_FASTER: dict[str, Any] = _SLIDING | {"hold": 20, "compress": 0.4}
_FLASH: dict[str, Any] = {"kernel": "flash_sde", "window": {"size": 1, "range": "first_half"}}


def _method(rollout: dict[str, Any], **algorithm: Any) -> dict[str, Any]:
    """What a paper does differently, for any flow-matching model and number of images."""
    return {"rollout": rollout, "algorithm": {"name": "grpo", **algorithm}}


PRESETS: dict[str, dict[str, Any]] = {
    "flow_grpo_sd35": _preset((48, 24), _steps(10, 4.5, 0.7, **_OLD), _KL, ema=True),
    "flow_grpo_sd35_1gpu": _preset((8, 8), _steps(10, 4.5, 0.7, **_OLD), _KL, ema=True),
    "flow_grpo_fast_sd35": _preset((48, 24), _steps(10, 1.0, 0.8, **_CPS), {"clip_range": 1e-5}, ema=True),
    "flow_grpo_flux": _preset((48, 24), _steps(6, _TOLD, 0.9, **_OLD), {}, ema=True),
    "flow_grpo_kontext": _preset((48, 21), _steps(6, _TOLD, 0.9, **_OLD), {}, ema=True),
    "flow_grpo_qwen": _preset((32, 16), _steps(10, 4.0, 1.2, uncond_grad=False, **_TWO), {}, lora=(64, 128)),
    "verl_sd35": _preset((8, 8), _steps(10, 1.0, 0.8, **_CPS), {"clip_range": 1e-5, **_UNBIASED}, lr=1e-4),
    "verl_qwen": _preset((32, 16), _steps(10, 4.0, 1.2, **_TWO), {"clip_range": 1e-5, **_UNBIASED}, lora=(64, 128)),
    "dance_flux": _preset(
        (16, 12),
        _steps(16, _TOLD, 0.3, **_DANCE | {"kernel": "dance_sde", "train_fraction": 0.6}),
        {"updates_per_step": 3, **_GROUP},
        lr=1e-5,
        lora=None,
    ),
    "dance_flux_lora": _preset(
        (8, 12),
        _steps(12, _TOLD, 0.3, **_DANCE | {"kernel": "dance_sde", "train_fraction": 0.6}),
        {"updates_per_step": 1, **_GROUP},
        lora=(128, 256),
    ),
    "mix_flux": _preset(
        (32, 12),
        _steps(25, _TOLD, 0.7, **_DANCE | {"window": {"size": 4, "range": (0, 24)}}),
        {"updates_per_step": 4, **_GROUP | {"advantage": "advantage_aggr"}},
        lr=1e-5,
        lora=None,
    ),
    "flow_grpo_fast": _method(
        {"num_steps": 10, "noise_level": 0.8, **_CPS, "window": {"size": 3, "range": "first_half"}}, clip_range=1e-5
    ),
    "dance_grpo": _method(
        {"num_steps": 16, "kernel": "dance_sde", "noise_level": 0.3, "window": None, "train_fraction": 0.6}
        | {"init_noise": "shared"},
        **_GROUP,
    ),
    "mix_grpo": _method(
        {"num_steps": 25, "noise_level": 0.7, "window": _SLIDING, "init_noise": "shared"},
        **_GROUP | {"advantage": "advantage_aggr"},
    ),
    "mix_grpo_flash": _method(
        {"num_steps": 25, "noise_level": 0.7, "window": _FASTER, "init_noise": "shared"}
        | {"solver": "dpmpp_2m", "shift": 3.0},
        **_GROUP | {"advantage": "advantage_aggr"},
    ),
    "tempflow_grpo": _method(
        {"num_steps": 10, "noise_level": 0.7, "window": {"size": 1, "range": "all"}, "init_noise": "shared"},
        step_weight="tempflow",
    ),
    "flash_grpo": _method({"num_steps": 20, **_FLASH}, clip_range=1e-3, step_weight="flash"),
}
"""Published settings. Where a paper counts per GPU, prompts are its GPUs and updates its group
size over its accumulation. DanceGRPO decodes the last step's x0, which is our Euler step to σ = 0. MixGRPO's window is
drawn, its strategy ``random``. eps is the published one, which can swallow gradients of mean log-probs.

The last six hold what makes a method, and nothing of models and batches. ``tempflow_grpo``: from shared noise the
steps before the stochastic one are the same for the whole group, which so branches at that step and is compared for it
alone. ``mix_grpo_flash`` compresses the steps after the window to 40 %, on the paper's grid of shift 3, and
the window stops where nothing would be left of them, at step 20. Its solver is used before the window, too."""
