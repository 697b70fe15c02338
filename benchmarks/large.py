"""A transformer as large as Stable Diffusion 3.5 medium (2.2B, random weights) on one GPU: throughput, memory, ratio.

    python benchmarks/large.py --peak-tflops 989      # an H100's dense bfloat16
    python benchmarks/large.py --tiny --device cpu    # a network of no size, to see that everything runs

Workload: 512x512 pixels (64x64 latents of 16 channels, 1,024 tokens), 333 text tokens, guidance 4.5 in a doubled pass,
10 steps of which 5 are stochastic and trained (Flow-SDE), LoRA of rank 32 on the attention, one optimizer step on all
images. Text encoders and VAE are left out: prompts are random numbers and pictures are grey. rlalign runs its own
Sampler and Learner, with GRPO.

MFU is what the network's matrix products alone would take at the card's peak over what they took: a forward pass is
counted by torch, one with a backward pass that reaches the LoRA alone as two (the weights' own gradients are not
computed), and as three where activations are made again. The deviation is max |ratio - 1| before the first update:
once with the rollout's micro-batch, once with half of it.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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
from rlalign.workers.learner import Learner, OptimizerConfig
from rlalign.workers.sampler import Sampler

STEPS, TRAINED, GUIDANCE = 10, 5, 4.5


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the network; by default that of Stable Diffusion 3.5 medium."""

    layers: int = 24
    dual: int = 13  # the first blocks with a second attention on the image alone
    heads: int = 24
    head_dim: int = 64
    text_width: int = 4096
    pooled_width: int = 2048
    channels: int = 16
    side: int = 64
    tokens: int = 333


TINY = Shape(layers=1, dual=1, heads=2, head_dim=8, text_width=8, pooled_width=8, channels=4, side=4, tokens=4)


class Family:
    """Nothing but the transformer."""

    prediction: PredictionType = "velocity"
    lora_targets: tuple[str, ...] = SD3.lora_targets
    guide = staticmethod(classifier_free_guidance)

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        with device:
            net = SD3Transformer2DModel(
                sample_size=2 * shape.side,
                in_channels=shape.channels,
                out_channels=shape.channels,
                num_layers=shape.layers,
                dual_attention_layers=tuple(range(shape.dual)),
                attention_head_dim=shape.head_dim,
                num_attention_heads=shape.heads,
                joint_attention_dim=shape.text_width,
                caption_projection_dim=shape.heads * shape.head_dim,
                pooled_projection_dim=shape.pooled_width,
                pos_embed_max_size=384,
                qk_norm="rms_norm",
            )
        self.net = net.to(dtype).eval().requires_grad_(False)
        self.nets: dict[str, nn.Module] = {"transformer": self.net}

    def encode(self, prompts: Sequence[Prompt]) -> tuple[Cond, Cond]:
        return self.text(len(prompts)), self.text(len(prompts))

    def text(self, count: int) -> Cond:
        sizes = {"text": (count, self.shape.tokens, self.shape.text_width), "pooled": (count, self.shape.pooled_width)}
        return {name: torch.randn(size, dtype=self.dtype, device=self.device) for name, size in sizes.items()}

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return self.shape.channels, self.shape.side, self.shape.side

    def schedule(self, steps: int, size: Size) -> Schedule:
        return flow_schedule(diffusers_static_sigmas(steps, 3.0))

    def predict(self, x: Tensor, time: Tensor, cond: Cond, size: Size) -> Tensor:
        return self.net(x, cond["text"], cond["pooled"], time, return_dict=False)[0]

    def decode(self, latents: Tensor, size: Size) -> Tensor:
        return torch.full((len(latents), 3, 1, 1), 0.5)

    def save_pipeline(self, folder: object) -> None:
        raise AssertionError("a benchmark saves nothing")


class Run:
    """One step's sampler and learner on one network."""

    def __init__(self, family: Family, prompts: int, samples: int, rows: int) -> None:
        parameters = attach(family.nets, ["transformer"], LoraConfig(rank=32), family.lora_targets, seed=0)
        window = Window(size=TRAINED, range=(0, TRAINED))
        settings = RolloutConfig(
            prompts_per_step=prompts,
            samples_per_prompt=samples,
            num_steps=STEPS,
            guidance_scale=GUIDANCE,
            size=(512, 512),
            window=window,
            micro_batch=rows,
        )
        self.policy, noise = Policy(family, settings, parameters, lora=True), Noise(0)
        texts = tuple(Prompt(f"prompt {number}") for number in range(prompts))
        self.units = split(0, texts, samples, rows)
        self.sampler = Sampler(self.policy, noise, "policy", keep_steps=True, shares=True)
        self.learner = Learner(self.policy, Algorithm(GRPO()), noise, OptimizerConfig(lr=1e-6), None)
        self.advantages = torch.tensor([-1.0, 1.0]).repeat(prompts, samples // 2)
        self.trajectories: list[Trajectory] = []

    def rollout(self) -> None:
        self.trajectories = [self.sampler.sample(unit)[0] for unit in self.units]

    def update(self) -> None:
        self.learner.update(self.trajectories, self.advantages, version=0)

    @torch.no_grad()
    def deviation(self, rows: int) -> float:
        """max |ratio - 1| of the trained steps, replayed in micro-batches of so many rows under the same weights."""
        batch, most = Trajectory.concat(self.trajectories), 0.0
        for part in torch.arange(batch.num_rows).split(rows):
            sample = batch.take(part).to(self.policy.device)
            for slot in range(sample.num_kept):
                now, sampled = self.policy.log_probs(sample, slot)
                most = max(most, float(((now - sampled).exp() - 1).abs().max()))
        return most


def measure(shape: Shape, args: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    family = Family(shape, dtype, device)
    if args.checkpointing:
        family.net.enable_gradient_checkpointing()
    run = Run(family, args.prompts, args.samples, args.rows)
    run.rollout()  # warms up, and gives what deviates
    result: dict[str, float] = {
        "parameters": sum(parameter.numel() for parameter in family.net.parameters()),
        "ratio_deviation": run.deviation(args.rows),
        "ratio_deviation_half_micro_batch": run.deviation(max(1, args.rows // 2)),
    }
    run.update()
    images = args.prompts * args.samples
    forward = flops_of_a_pass(family, args.rows) / args.rows  # of one row
    passes = {"rollout": 2 * STEPS, "update": 2 * TRAINED * (3 if args.checkpointing else 2)}  # guidance doubles them
    for name, work in (("rollout", run.rollout), ("update", run.update)):
        seconds, memory = timed(work, device, args.rounds)
        result |= {f"{name}_s": seconds, f"{name}_images_per_s": images / seconds, f"{name}_gib": memory}
        if args.peak_tflops:
            result[f"{name}_mfu"] = images * passes[name] * forward / seconds / (args.peak_tflops * 1e12)
    return result


def flops_of_a_pass(family: Family, rows: int) -> float:
    """Of a forward pass of so many rows, matrix products and attention alone."""
    x = torch.randn(rows, *family.latent_shape(Size(1, 1)), dtype=family.dtype, device=family.device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        family.predict(x, torch.full((rows,), 500.0, device=family.device), family.text(rows), Size(1, 1))
    return float(counter.get_total_flops())


def timed(work: Callable[[], None], device: torch.device, rounds: int) -> tuple[float, float]:
    """Seconds, the median of the rounds, and the most GiB of GPU memory."""
    seconds: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    return sorted(seconds)[rounds // 2], memory


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="of each prompt")
    parser.add_argument("--rows", type=int, default=8, help="of a micro-batch; guidance doubles them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of the card in this dtype, for MFU")
    parser.add_argument("--checkpointing", action="store_true", help="make activations again in the backward pass")
    parser.add_argument("--tiny", action="store_true", help="a network of no size, to see that everything runs")
    parser.add_argument("--to", type=Path, help="write the numbers to this JSON file, too")
    args = parser.parse_args(arguments)
    result = measure(TINY if args.tiny else Shape(), args)
    print("\n".join(f"{name:36}{value:16.6g}" for name, value in result.items()))
    if args.to:
        args.to.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
