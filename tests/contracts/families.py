"""What the conformance test needs of each model family: a tiny random pipeline, and its library's own way to use it.

A new family adds one entry to FAMILIES.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from diffusers import StableDiffusion3Pipeline
from safetensors import safe_open
from torch import Tensor

from rlalign.models import analytic
from rlalign.models.base import Family
from rlalign.models.lora import LORA_FILE
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Prompt, Size
from tests.tiny import sd3_folder


class Plain(Protocol):
    """The pipeline in the hands of its own library, without a line of rlalign."""

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        """The scheduler's sigmas [N + 1] and times [N]."""
        ...

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        """Pixels [P, 3, H, W] in [0, 1] from these initial latents."""
        ...

    def load_lora(self, folder: Path) -> None: ...


@dataclass(frozen=True, slots=True)
class Case:
    module: str  # rlalign.models.<module>
    write: Callable[[Path], Path]  # writes the pipeline's folder
    plain: Callable[[Path], Plain]
    size: Size
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    dtype: torch.dtype = torch.float32

    @property
    def source(self) -> ModuleType:
        return importlib.import_module(f"rlalign.models.{self.module}")

    def load(self, folder: Path) -> Family:
        return self.source.Family.load(self.source.Config(**self.config), str(folder), self.dtype, "cpu")


class PlainSD3:
    def __init__(self, folder: Path, max_sequence_length: int, t5: bool, size: Size) -> None:
        without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without)
        self.pipeline.set_progress_bar_config(disable=True)
        self.max_sequence_length, self.size = max_sequence_length, size

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        self.draw([Prompt("a")], torch.zeros(1, 4, 8, 8), steps, 1.0)
        return self.pipeline.scheduler.sigmas, self.pipeline.scheduler.timesteps

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        return self.pipeline(
            prompt=[prompt.text for prompt in prompts],
            negative_prompt=[prompt.negative or "" for prompt in prompts],
            latents=latents,
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=self.size.height,
            width=self.size.width,
            max_sequence_length=self.max_sequence_length,
            output_type="pt",
        ).images

    def load_lora(self, folder: Path) -> None:
        self.pipeline.load_lora_weights(folder)


def sd3(tokens: int, *, t5: bool = False, scheduler: dict[str, Any] | None = None) -> Case:
    size = Size(16, 16)
    return Case(
        module="sd3",
        write=lambda folder: sd3_folder(folder, t5=t5, scheduler=scheduler),
        plain=lambda folder: PlainSD3(folder, tokens, t5, size),
        size=size,
        config={"text_encoder_3": t5, "max_sequence_length": tokens},
    )


class PlainMixture:
    """Euler steps along the exact velocity, written out by hand."""

    def __init__(self, folder: Path) -> None:
        self.family = analytic.Family.load(analytic.Config(**MIXTURE), str(folder), torch.float64, "cpu")

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        sigmas = 3 * u / (1 + 2 * u)
        return sigmas, 1000 * sigmas[:-1]

    def draw(self, prompts: Sequence[Prompt], latents: Tensor, steps: int, guidance: float) -> Tensor:
        x, weights = latents.flatten(1), torch.tensor([MIXTURE["prompt_weights"][prompt.text] for prompt in prompts])
        sigmas, _ = self.table(steps)
        for now, nxt in pairwise(sigmas):
            conditional, free = (
                self.family.net(x, now.expand(len(x)), w.double().log()) for w in (weights, torch.ones_like(weights))
            )
            x = x + (nxt - now) * (free + guidance * (conditional - free))
        return (0.5 + x.detach() / 10).clamp(0, 1).reshape(-1, 1, 2, 2).expand(-1, 3, -1, -1)

    def load_lora(self, folder: Path) -> None:
        with safe_open(folder / LORA_FILE, "pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
            a, b = (file.get_tensor(f"velocity.residual.lora_{end}.weight") for end in "AB")
        self.family.net.residual.weight += metadata["velocity.lora_alpha"] / metadata["velocity.r"] * b @ a


MIXTURE: dict[str, Any] = {
    "means": [[1.0, 0.0, -2.0, 0.5], [-1.0, 2.0, 0.0, 0.0]],
    "stds": [[0.5, 1.0, 0.7, 0.2], [1.0, 0.3, 0.4, 1.0]],
    "prompt_weights": {"red cat": [0.9, 0.1], "two": [0.2, 0.8]},
}

FAMILIES = {
    "sd3-clip": sd3(0),
    "sd3-zeros": sd3(256),
    "sd3-t5": sd3(16, t5=True),
    "sd3-dynamic": sd3(0, scheduler={"use_dynamic_shifting": True, "max_shift": 2.0, "base_image_seq_len": 4}),
    "analytic": Case(
        module="analytic",
        write=lambda folder: _saved(folder),
        plain=PlainMixture,
        size=Size(2, 2),
        config=MIXTURE,
        dtype=torch.float64,
    ),
}


def _saved(folder: Path) -> Path:
    analytic.Family.load(analytic.Config(**MIXTURE), "", torch.float64, "cpu").save_pipeline(folder)
    return folder


def rollout_settings(case: Case, **changes: Any) -> RolloutConfig:
    return RolloutConfig(size=case.size[:2], **{"num_steps": 4, "micro_batch": 2, **changes})


def ode(policy: Policy, prompts: Sequence[Prompt], latents: Tensor, settings: RolloutConfig) -> Tensor:
    """Pixels [P, 3, H, W]: one sample a prompt, every step deterministic."""
    cond, uncond = policy.family.encode(prompts)
    kept = torch.zeros(len(prompts), 0, dtype=torch.int64)
    stochastic = torch.zeros(len(prompts), settings.num_steps, dtype=torch.bool)
    with torch.no_grad():
        chain = policy.roll_out(
            latents, cond, uncond, policy.schedule(settings), stochastic, kept, lambda k: latents, settings
        )
        return policy.family.decode(chain.final, policy.size)
