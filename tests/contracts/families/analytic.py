"""A mixture of Gaussians in four dimensions, whose velocity is known."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rlalign.models import analytic
from rlalign.models.lora import LORA_FILE
from rlalign.types import Prompt, Size
from tests.contracts.families.case import Case


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


def _saved(folder: Path) -> Path:
    analytic.Family.load(analytic.Config(**MIXTURE), "", torch.float64, "cpu").save_pipeline(folder)
    return folder


CASES = {
    "analytic": Case(
        module="analytic",
        write=_saved,
        plain=PlainMixture,
        size=Size(2, 2),
        config=MIXTURE,
        dtype=torch.float64,
    )
}
