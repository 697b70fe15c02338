"""What the conformance test needs of a model family, and how it rolls one out."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from rlalign.models.base import Family
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Prompt, Size


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
