"""Gradients -> steps: AdamW, with its moments in 32 or 8 bits, and float32 masters of weights in half precision."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rlalign.settings import Settings

HALF = (torch.bfloat16, torch.float16)


class OptimizerConfig(Settings):
    """AdamW."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the moments in 8 bits, a quarter of their memory (bitsandbytes, arXiv 2110.02861)."""
    lr: float = Field(default=3e-4, gt=0)
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = Field(default=1e-15, gt=0)
    """Mean-reduced log-probs make gradients tiny: the usual 1e-8 can swallow them (docs/kernels.md)."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""


class Optimizer:
    """Steps of the named weights.

    bfloat16 has 8 bits: an update smaller than 1/256 of a weight would leave it as it is. So weights in half precision
    have masters in float32, which make the steps and are rounded to the weights after each.
    """

    def __init__(self, config: OptimizerConfig, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = weights
        self.masters = {key: nn.Parameter(w.detach().float()) for key, w in weights.items() if w.dtype in HALF}
        self.stepped = {key: self.masters.get(key, weight) for key, weight in weights.items()}
        self.inner = _made(config, [*self.stepped.values()])

    def with_gradients(self) -> list[nn.Parameter]:
        """What steps, with the gradients of the weights; masters take theirs over."""
        for key, master in self.masters.items():
            weight = self.weights[key]
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        return [*self.stepped.values()]

    @torch.no_grad()
    def step(self) -> None:
        self.inner.step()
        for key, master in self.masters.items():
            self.weights[key].copy_(master)

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def move(self, device: torch.device | str) -> None:
        """Masters and moments; the weights are the policy's."""
        for master in self.masters.values():
            master.data = master.data.to(device)
        for state in self.inner.state.values():
            state.update({name: value.to(device) for name, value in state.items() if isinstance(value, Tensor)})

    def tensors(self) -> dict[str, Tensor]:
        """Masters as "master/NAME", moments and the like as "optimizer/NAME/MOMENT"; the tensors themselves."""
        tensors = {f"master/{key}": master.data for key, master in self.masters.items()}
        for key, stepped in self.stepped.items():
            for moment, value in self.inner.state[stepped].items():
                tensors[f"optimizer/{key}/{moment}"] = _tensor(moment, value)
        return tensors

    def like(self) -> dict[str, Tensor]:
        """Tensors in the shape of those that are as large as the weights, whether there are any yet or not."""
        masters = {f"master/{key}": master.data for key, master in self.masters.items()}
        names = ("exp_avg", "exp_avg_sq")
        return masters | {f"optimizer/{key}/{name}": p.data for key, p in self.stepped.items() for name in names}

    @torch.no_grad()
    def load(self, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """What ``tensors`` named "master/..." and "optimizer/...", without these beginnings."""
        if masters.keys() != self.masters.keys():
            raise ValueError(f"the checkpoint has {len(masters)} float32 masters, and {len(self.masters)} are needed")
        for key, tensor in masters.items():
            self.masters[key].copy_(tensor)
        for key, stepped in self.stepped.items():
            own = {name.rpartition("/")[2]: t for name, t in moments.items() if name.rpartition("/")[0] == key}
            self.inner.state[stepped] = {name: _value(tensor, stepped.device) for name, tensor in own.items()}


def _made(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    settings: dict[str, Any] = config.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, **settings, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]  # an extra
    except ModuleNotFoundError:
        raise ValueError(
            "optimizer.kind adamw8bit needs bitsandbytes: pip install 'rlalign[eight-bit]', or set it to adamw"
        ) from None
    return AdamW8bit(parameters, **settings)


def _tensor(moment: str, value: Any) -> Tensor:
    """As a file holds it: bitsandbytes counts steps in Python, and has one map of 8 bits to numbers for all weights."""
    if isinstance(value, int):
        return torch.tensor(value)
    return value.clone() if moment.startswith("qmap") else value


def _value(tensor: Tensor, device: torch.device) -> Any:
    counts = tensor.ndim == 0 and tensor.dtype == torch.int64
    return tensor.item() if counts else tensor.to(device)
