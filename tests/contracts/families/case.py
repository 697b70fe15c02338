"""What the conformance test needs of a model family, and how it rolls one out."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from rlalign.models.base import Family
from rlalign.policy import Policy, RolloutConfig
from rlalign.types import Prompt, Size

TEXTS = (Prompt("red cat"), Prompt("two", negative="blue"))


class Plain(Protocol):
    """The pipeline in the hands of its own library, without a line of rlalign."""

    def table(self, steps: int) -> tuple[Tensor, Tensor]:
        """The scheduler's sigmas [N + 1], as ``Schedule`` has them, and times [N]."""
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
    least_steps: int = 1
    vp: bool = False  # alpha^2 + sigma^2 = 1, not the flow path
    solver: str = "euler"  # what the pipeline's own scheduler does
    guided: bool = True  # by a second pass, from the negative prompt
    images: bool = False  # prompts have one, which the sample is made from

    @property
    def source(self) -> ModuleType:
        return importlib.import_module(f"rlalign.models.{self.module}")

    @property
    def prompts(self) -> list[Prompt]:
        return [with_image(prompt, row, self.size) if self.images else prompt for row, prompt in enumerate(TEXTS)]

    def load(self, folder: Path) -> Family:
        return self.source.Family.load(self.source.Config(**self.config), str(folder), self.dtype, "cpu")


def with_image(prompt: Prompt, row: int, size: Size) -> Prompt:
    """A picture of its own for every row."""
    noise = torch.randint(0, 256, (3, *size[:2]), generator=torch.Generator().manual_seed(row), dtype=torch.uint8)
    return replace(prompt, image=noise)


def rollout_settings(case: Case, **changes: Any) -> RolloutConfig:
    own = {"kernel": "ddim" if case.vp else "flow_sde", "solver": case.solver}
    size = case.size[:2] if case.size.frames == 1 else case.size
    return RolloutConfig(size=size, **{"num_steps": 4, "micro_batch": 2, **own, **changes})


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
