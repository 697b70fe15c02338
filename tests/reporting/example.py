"""A run directory as a short run leaves it, with made-up numbers and pictures."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlalign.confighash import hashed_part
from rlalign.reporting.alarms import AlarmLog
from rlalign.reporting.grids import save_grid
from rlalign.reporting.metrics import MetricsLog
from rlalign.rundir import Run, open_run

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")


def config(steps: int) -> dict[str, Any]:
    return {
        "model": {"family": "sd3", "path": "zoo:scenes", "lora": {"rank": 32}},
        "rollout": {"prompts_per_step": 24, "samples_per_prompt": 8, "num_steps": 8},
        "rewards": [{"use": "composition", "weight": 1.0}],
        "algorithm": {"name": "grpo", "clip_range": 1e-4},
        "steps": steps,
        "seed": 0,
    }


def example_run(path: Path, steps: int = 12, done: int = 12, every: int = 4) -> Run:
    """``done`` of ``steps`` steps with an evaluation every few; the caller closes the run."""
    block = config(steps)
    run = open_run(path, block, hashed_part(block), ["rlalign", "train", "quickstart"])
    with MetricsLog(run.files.metrics, run.step, steps) as log:
        for step in range(done):
            row = training(step, steps)
            if step % every == 0:
                row |= {f"eval/{name}": value for name, value in held_out(step, steps).items()}
                save_grid(pictures(step, steps), captions(), run.files.sample(step))
            if step + 1 == steps:
                row |= {f"eval_final/{name}": value for name, value in held_out(steps, steps).items()}
                save_grid(pictures(steps, steps), captions(), run.files.sample(steps))
            log.write(row)
    AlarmLog(run.files.alarms).write(3, "clip_saturation", "60% of the ratios were clipped: lower optimizer.lr <b>")
    run.mark("finished" if done == steps else "interrupted", done)
    return run


def training(step: int, steps: int) -> dict[str, float | None]:
    wobble = math.sin(7.3 * step) * 0.03
    return {
        "step": step,
        "reward/mean": 0.33 + 0.25 * step / steps + wobble,
        "reward/std": 0.4,
        "reward/composition/mean": 0.33 + 0.25 * step / steps + wobble,
        "kl": 1e-4 * step if step % 5 else None,
        "ratio/max_abs_dev": 0.0,
        "clip_fraction": 0.1 + wobble,
        "grad_norm": 0.5 + 5 * wobble,
        "diversity": 1.0 - 0.1 * step / steps,
        "images": 192 * (step + 1),
        "time/rollout_s": 1.2 + wobble,
        "time/reward_s": 0.1,
        "time/update_s": 2.1,
        "time/publish_s": 0.01,
        "time/step_s": 3.5 + wobble,
        "images_per_s": 192 / (3.5 + wobble),
        "odd_metric": 1e-7,
    }


def held_out(step: int, steps: int) -> dict[str, float]:
    gain = step / steps
    tasks = {f"task/{task}": (0.9 - 0.15 * i) * (0.5 + 0.4 * gain) for i, task in enumerate(TASKS)}
    mean = 0.33 + 0.22 * gain
    rewards = {"reward/mean": mean, "reward/composition/mean": mean, "reward/jpeg/mean": -1.7 - 0.1 * gain}
    return {**rewards, **tasks, "distance": 0.4 - 0.03 * gain, "diversity": 1 - 0.08 * gain}


def captions() -> list[str]:
    long = "a red circle left of a blue square " * 6
    return ["two green triangles", "the text 42 <small>", long, "ein großer Kreis"]


def pictures(step: int, steps: int) -> Tensor:
    """[4, 4, 3, 32, 32] uint8: discs that come out of the noise."""
    noise = torch.rand(4, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    disc = ((y - 16) ** 2 + (x - 16) ** 2 < 90).float() * torch.eye(4, 3)[:, None, :, None, None]
    return ((noise + (disc - noise) * step / steps) * 255).to(torch.uint8)
