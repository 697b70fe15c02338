"""What rlalign costs over the network itself: CPU seconds of rollout and update against the bare evaluations.

    python benchmarks/overhead.py            # a table
    python benchmarks/overhead.py --json     # one line

Workload: 8 prompts x 4 images, 10 steps, guidance 4.5, LoRA of rank 8 on the attention of a small Stable Diffusion 3
transformer (4 layers x 4 heads x 32), latents 16x16x16, 77 text tokens, 5 of 10 steps stochastic (Flow-SDE, a window)
and trained, two optimizer steps, 1 thread. rlalign runs its own Sampler and Learner, with GRPO.

The floor is the same network object with its LoRA attached: the same evaluations on ready inputs without gradient
(rollout), and with a backward pass that reaches the LoRA alone (update). No scheduler, noise, log-probs, loss or
optimizer. Encoding of text and decoding are left out on both sides. Both sides pass the same number of rows: of a few,
the one with the fastest floor. Every round measures all sides one after the other; the numbers are medians of rounds.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from rlalign.algorithms.grpo import Algorithm
from rlalign.algorithms.grpo import Config as GRPO
from rlalign.mdp.noise import Noise
from rlalign.mdp.schedule import diffusers_static_sigmas, flow_schedule
from rlalign.models.base import PredictionType, classifier_free_guidance
from rlalign.models.lora import LoraConfig, attach
from rlalign.models.sd3 import Family as SD3
from rlalign.pipeline import split
from rlalign.policy import Policy, RolloutConfig, Window
from rlalign.types import Cond, Prompt, Schedule, Size, Trajectory
from rlalign.workers.learner import Learner
from rlalign.workers.optimizer import OptimizerConfig
from rlalign.workers.sampler import Sampler

SIDES = ("floor", "rlalign", "detached")
TEXT_WIDTH = 64
PROMPTS = [Prompt(f"prompt {number}") for number in range(8)]
SAMPLES, UPDATES = 4, 2
NUM_ROWS = len(PROMPTS) * SAMPLES


@dataclass(frozen=True, slots=True)
class Workload:
    """What a smoke test makes smaller."""

    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    channels: int = 16
    side: int = 16
    tokens: int = 77
    steps: int = 10

    @property
    def trained(self) -> int:
        return self.steps // 2


class Family:
    """Nothing but the transformer: text is random numbers, pictures are grey."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = SD3.lora_targets
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, work: Workload) -> None:
        self.work = work
        width = work.heads * work.head_dim
        self.net = SD3Transformer2DModel(
            sample_size=work.side,
            patch_size=2,
            in_channels=work.channels,
            out_channels=work.channels,
            num_layers=work.layers,
            attention_head_dim=work.head_dim,
            num_attention_heads=work.heads,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=width,
            pooled_projection_dim=TEXT_WIDTH,
            pos_embed_max_size=work.side // 2,
        ).eval()
        self.nets: dict[str, nn.Module] = {"transformer": self.net}

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond]:
        return self._text(len(prompts)), self._text(len(prompts))

    def _text(self, count: int) -> Cond:
        return {"text": torch.randn(count, self.work.tokens, TEXT_WIDTH), "pooled": torch.randn(count, TEXT_WIDTH)}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return self.work.channels, self.work.side, self.work.side

    def schedule(self, steps: int, size: Size) -> Schedule:
        return flow_schedule(diffusers_static_sigmas(steps, 3.0))

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        return self.net(x, cond["text"], cond["pooled"], time, return_dict=False)[0]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        return torch.full((len(latents), 3, 1, 1), 0.5)

    def save_pipeline(self, folder: object) -> None:
        raise AssertionError("a benchmark saves nothing")


class Floor:
    """The bare evaluations, two halves of guidance in one pass."""

    def __init__(self, family: Family, parameters: Sequence[nn.Parameter], rows: int) -> None:
        self.net, self.parameters, self.steps = family.net, parameters, family.work.steps
        self.trained, self.passes = family.work.trained, NUM_ROWS // rows
        self.x = torch.randn(2 * rows, *family.latent_shape(Size(1, 1)))
        self.cond, self.time = family._text(2 * rows), torch.full((2 * rows,), 500.0)

    def evaluate(self) -> Tensor:
        return self.net(self.x, self.cond["text"], self.cond["pooled"], self.time, return_dict=False)[0]

    @torch.no_grad()
    def rollout(self) -> None:
        for _ in range(self.steps * self.passes):
            self.evaluate()

    def update(self) -> None:
        for _ in range(self.trained * self.passes):
            output = self.evaluate()
            output.backward(torch.ones_like(output))
        for parameter in self.parameters:
            parameter.grad = None


class Ours:
    """rlalign's sampler and learner on the same network."""

    def __init__(
        self,
        family: Family,
        parameters: dict[str, nn.Parameter],
        rows: int,
        uncond_grad: bool = True,
        updates: int = UPDATES,
        retain: bool | Literal["gradients"] = False,
    ) -> None:
        settings = RolloutConfig(
            prompts_per_step=len(PROMPTS),
            samples_per_prompt=SAMPLES,
            num_steps=family.work.steps,
            guidance_scale=4.5,
            size=(1, 1),
            window=Window(size=family.work.trained, range=(0, family.work.steps - 1)),
            uncond_grad=uncond_grad,
            micro_batch=rows,
            retain=retain,
        )
        policy, noise = Policy(family, settings, parameters, lora=True), Noise(0)
        self.units = split(0, tuple(PROMPTS), SAMPLES, rows)
        self.sampler = Sampler(policy, noise, "policy", keep_steps=True, shares=True)
        self.learner = Learner(policy, Algorithm(GRPO()), noise, OptimizerConfig(), None, updates)
        self.advantages = torch.tensor([-1.0, 1.0]).repeat(len(PROMPTS), SAMPLES // 2)
        self.trajectories: list[Trajectory] = []

    def rollout(self) -> None:
        self.trajectories = [self.sampler.sample(unit)[0] for unit in self.units]

    def update(self) -> None:
        self.learner.update(self.trajectories, self.advantages, version=0)


def cpu_seconds(work: Callable[[], None]) -> float:
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def best_rows(family: Family, parameters: Sequence[nn.Parameter]) -> int:
    """Of a few sizes, that of the fastest floor; all of them divide an optimizer step's rows."""
    floors = {rows: Floor(family, parameters, rows) for rows in (4, 8, 16)}
    times = {rows: min(cpu_seconds(f.rollout) + cpu_seconds(f.update) for _ in range(2)) for rows, f in floors.items()}
    return min(times, key=times.__getitem__)


def measure(work: Workload, rounds: int, rows: int | None) -> dict[str, float]:
    """Seconds by "<side>/<part>" and what follows from them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    family = Family(work)
    parameters = attach(family.nets, ["transformer"], LoraConfig(rank=8, alpha=16), family.lora_targets, seed=0)
    rows = rows or best_rows(family, list(parameters.values()))
    sides = {
        "floor": Floor(family, list(parameters.values()), rows),
        "rlalign": Ours(family, parameters, rows),
        "detached": Ours(family, parameters, rows, uncond_grad=False),
    }
    seconds: dict[str, list[float]] = {f"{side}/{part}": [] for side in sides for part in ("rollout", "update")}
    for number in range(rounds + 1):
        for name, side in sides.items():
            taken = {f"{name}/rollout": cpu_seconds(side.rollout), f"{name}/update": cpu_seconds(side.update)}
            if number:  # the first round warms up, and encodes the prompts
                for key, value in taken.items():
                    seconds[key].append(value)
    return summary({key: median(values) for key, values in seconds.items()}) | {"rows_per_pass": rows, "rounds": rounds}


def summary(seconds: dict[str, float]) -> dict[str, float]:
    result = {f"{key}_s".replace("/", "_"): value for key, value in seconds.items()}
    for side, prefix in (("rlalign", ""), ("detached", "detached_")):
        for part in ("rollout", "update"):
            result[f"{prefix}{part}_over_floor"] = seconds[f"{side}/{part}"] / seconds[f"floor/{part}"]
        result[f"{prefix}total_over_floor"] = total(seconds, side) / total(seconds, "floor")
        result[f"{prefix}images_per_cpu_s"] = NUM_ROWS / total(seconds, side)
    result["floor_images_per_cpu_s"] = NUM_ROWS / total(seconds, "floor")
    return result


def total(seconds: dict[str, float], side: str) -> float:
    return seconds[f"{side}/rollout"] + seconds[f"{side}/update"]


def table(result: dict[str, float]) -> str:
    lines = [f"{'CPU seconds':28}{'floor':>9}{'rlalign':>9}{'ratio':>8}{'detached':>10}{'ratio':>8}"]
    for part in ("rollout", "update"):
        numbers = [result[f"{side}_{part}_s"] for side in SIDES]
        lines.append(_line(part, numbers, result[f"{part}_over_floor"], result[f"detached_{part}_over_floor"]))
    numbers = [sum(result[f"{side}_{part}_s"] for part in ("rollout", "update")) for side in SIDES]
    lines.append(_line("total", numbers, result["total_over_floor"], result["detached_total_over_floor"]))
    rates = [result[f"{prefix}images_per_cpu_s"] for prefix in ("floor_", "", "detached_")]
    lines.append("{:28}{:9.2f}{:9.2f}{:8}{:10.2f}".format("images per CPU second", rates[0], rates[1], "", rates[2]))
    lines.append(f"{int(result['rows_per_pass'])} rows a pass (doubled by guidance), median of {int(result['rounds'])}")
    lines.append("detached: no gradient through the unconditional half (rollout.uncond_grad: false)")
    return "\n".join(lines)


def _line(part: str, numbers: list[float], ratio: float, detached: float) -> str:
    return f"{part:28}{numbers[0]:9.3f}{numbers[1]:9.3f}{ratio:8.3f}{numbers[2]:10.3f}{detached:8.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, help="rows of one pass; default: what is fastest for the floor")
    parser.add_argument("--tiny", action="store_true", help="a network of no size, to see that everything runs")
    args = parser.parse_args(arguments)
    work = Workload(layers=1, heads=2, head_dim=8, channels=4, side=4, tokens=4, steps=4) if args.tiny else Workload()
    result = measure(work, args.rounds, args.rows)
    print(json.dumps(result) if args.json else table(result))


if __name__ == "__main__":
    main()
