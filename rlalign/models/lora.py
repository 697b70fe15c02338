"""Which weights train: low-rank adapters by peft on any torch module, or all of them.

Names of weights are "<net>.<parameter>", the same in checkpoints, in published weights and here.
peft and transformers take seconds to import, so only functions that need them do.
"""

import json
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from rlalign.settings import Settings

ADAPTER = "default"  # peft's own name for the only one; it is part of the weights' names
METADATA = "lora_adapter_metadata"
LORA_FILE = "pytorch_lora_weights.safetensors"  # what load_lora_weights looks for in a folder

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # of text encoders, as diffusers' scripts: CLIP's attention


class LoraConfig(Settings):
    """Low-rank adapters: W + alpha / rank * B A, with B = 0 at the start (arXiv 2106.09685)."""

    rank: int = Field(default=32, ge=1)
    """Rank of the update of every adapted layer."""
    alpha: float = Field(default=64, gt=0)
    """Scale of the update, in units of the rank."""
    targets: tuple[str, ...] | None = None
    """Ends of the names of the layers that are adapted; null takes the family's own."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """Of A: normal with std 1 / rank, as the diffusers scripts and flow_grpo, or peft's uniform."""


def encoders_among(nets: Iterable[str]) -> list[str]:
    """Names of text encoders."""
    return [name for name in nets if name.startswith("text_encoder")]


def targets_of(config: LoraConfig, net: str, family_targets: Sequence[str]) -> Sequence[str]:
    """Ends of the names of the layers that are adapted in the net of that name."""
    return config.targets or (TEXT_TARGETS if encoders_among([net]) else family_targets)


def freeze(module: nn.Module) -> None:
    """Evaluation mode, no gradients, and tensors in memory of their own.

    Files are mapped into memory at odd addresses, and the last bit of a product depends on the address: without this,
    a copy of the weights (reference, old, ema) would give other numbers than the weights.
    """
    module.requires_grad_(False).eval()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def attach(
    nets: Mapping[str, nn.Module], names: Sequence[str], config: LoraConfig, family_targets: Sequence[str], seed: int
) -> dict[str, nn.Parameter]:
    """Adapts the named nets and freezes everything else; the new weights by name, the same for the same seed."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    _freeze(nets, names)
    for name in names:
        adapter = PeftConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # peft divides it by the rank
            target_modules=list(targets_of(config, name, family_targets)),
            init_lora_weights="gaussian" if config.init == "gaussian" else True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would move the generators of GPUs too
            inject_adapter_in_model(adapter, nets[name], ADAPTER)
    parameters = _trainable(nets, names)
    for parameter in parameters.values():  # half precision would swallow small updates
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return parameters


def full(nets: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, nn.Parameter]:
    """All weights of the named nets train, nothing else does."""
    _freeze(nets, names)
    for name in names:
        nets[name].requires_grad_(True)
    return _trainable(nets, names)


@contextmanager
def reference_weights(nets: Mapping[str, nn.Module]) -> Iterator[None]:
    """The nets compute without their adapters inside the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for net in nets.values() for layer in net.modules() if isinstance(layer, BaseTunerLayer)]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(nets: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The nets, those with adapters as copies on the CPU that have them in their weights, as before ``attach``."""
    return {name: _merged(_copied(net)) if hasattr(net, "peft_config") else net for name, net in nets.items()}


def save_lora(
    nets: Mapping[str, nn.Module], folder: Path, tensors: Mapping[str, Tensor], file: str = LORA_FILE
) -> Path:
    """Writes adapter weights, named as by ``attach``, to a file that ``pipe.load_lora_weights(folder)`` reads.

    Rank and alpha go along as diffusers' own metadata: without them a reader takes alpha = rank.
    """
    state = {name.replace(f".{ADAPTER}.", "."): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    adapted = {name: adapter_of(net) for name, net in nets.items() if hasattr(net, "peft_config")}
    own = [metadata_of(name, config, config.lora_alpha) for name, config in adapted.items()]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / file, {"format": "pt", METADATA: json.dumps(dict(ChainMap(*own)))})
    return folder / file


def takes_adapters(net: nn.Module) -> bool:
    """Whether diffusers can load a LoRA into it."""
    from diffusers.loaders.peft import PeftAdapterMixin

    return isinstance(net, PeftAdapterMixin)


def adapter_of(net: nn.Module) -> Any:
    """peft's config of what ``attach`` put into the net."""
    return net.peft_config[ADAPTER]  # pyright: ignore[reportIndexIssue, reportArgumentType]


def metadata_of(name: str, config: Any, alpha: float) -> dict[str, Any]:
    """What diffusers has to know of a net's adapters, by its names for it."""
    own = {"r": config.r, "lora_alpha": alpha, "target_modules": sorted(config.target_modules)}
    return {f"{name}.{key}": value for key, value in own.items()}


def _freeze(nets: Mapping[str, nn.Module], names: Sequence[str]) -> None:
    if strange := [name for name in names if name not in nets]:
        raise ValueError(f"there is no net called {strange[0]!r} to train; there are: {', '.join(nets)}")
    for net in nets.values():
        net.requires_grad_(False)


def _trainable(nets: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, nn.Parameter]:
    found = {f"{name}.{key}": p for name in names for key, p in nets[name].named_parameters() if p.requires_grad}
    return dict(sorted(found.items()))


def _copied(net: nn.Module) -> nn.Module:
    """On the CPU: the GPU may have no room for a second one."""
    copies: dict[int, Any] = {}
    for tensor in chain(net.parameters(), net.buffers()):
        copy = tensor.detach().to("cpu", copy=True)
        copies[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return deepcopy(net, copies)


def _merged(net: nn.Module) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(net.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            net.set_submodule(name, layer.get_base_layer())
    del net.peft_config
    return net
