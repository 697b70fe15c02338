"""How a large model fits onto a GPU: what its library offers for that, and parts that wait on the CPU."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from pydantic import Field
from torch import nn
from torch.utils.checkpoint import checkpoint

from rlalign.models.base import Family, HasPipeline
from rlalign.settings import Settings

Part = Literal["text_encoders", "vae"]
BEGINNINGS: Mapping[str, tuple[str, ...]] = {"text_encoders": ("text_encoder", "image_encoder"), "vae": ("vae",)}
"""Of the names that diffusers has for them."""


class MemoryConfig(Settings):
    """How a large model fits onto a GPU."""

    gradient_checkpointing: bool = False
    """Make the activations of each block of the nets again in the backward pass instead of keeping them: the same
    gradients, for one more forward pass."""
    vae_tiling: bool = False
    """Let the VAE work in overlapping tiles on pictures that are larger than those it was made for."""
    vae_slicing: bool = False
    """Let the VAE work on one picture of a micro-batch after the other."""
    attention: str | None = None
    """How the nets compute attention, by diffusers' name such as native, flash or sage; null: as the library does."""
    offload: list[Part] = Field(default=[])
    """Parts that wait in CPU memory until they are used, and are moved every time: text_encoders, vae."""
    embeddings: Path | None = None
    """A folder that keeps encoded prompts for all workers and runs; null: each worker keeps its own in memory."""


class Offloaded:
    """Parts of a pipeline that wait on the CPU; ``Offloaded()`` are none."""

    def __init__(
        self, parts: Mapping[str, Sequence[nn.Module]] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.parts, self.device = parts or {}, device
        self.fetched: set[str] = set()

    @contextmanager
    def here(self, *names: str) -> Iterator[None]:
        """Those of these parts that wait are on the device inside the block, and of blocks in blocks the outermost."""
        own = {*names} - self.fetched
        modules = [module for name in own for module in self.parts.get(name, ())]
        waiting = [(weight, weight.data) for module in modules for weight in module.parameters()]
        self.fetched |= own
        try:
            for module in modules:
                module.to(self.device)
            yield
        finally:
            self.fetched -= own
            for weight, data in waiting:  # it never trains, so nothing has to travel back
                weight.data = data
            for module in modules:
                module.to("cpu")


def fit(family: Family, config: MemoryConfig, trained: Sequence[str]) -> None:
    """Changes the family's nets and VAE as the settings say; ValueError where the model has no such thing.

    ``trained`` are the names of the nets whose activations would be kept.
    """
    if config.gradient_checkpointing:
        for name in trained:
            if name in family.nets:
                _checkpoint(name, family.nets[name])
    if config.attention is not None:
        _set_attention(family, config.attention)
    if config.vae_tiling:
        _ask_vae(family, "tiling")
    if config.vae_slicing:
        _ask_vae(family, "slicing")


def placed(family: Family, parts: Sequence[str], device: torch.device, resting: bool = False) -> Offloaded:
    """Everything of a family that was loaded on the CPU goes to the device, but for these parts.

    ``resting``: not yet.
    """
    if not parts:
        return Offloaded()
    modules = modules_of(family, "offload")
    waiting = {part: [one for name, one in modules.items() if name.startswith(BEGINNINGS[part])] for part in parts}
    starts = tuple(start for part in parts for start in BEGINNINGS[part])
    for name, module in modules.items():
        if not resting and not name.startswith(starts):
            module.to(device)
    return Offloaded(waiting, device)


def _checkpoint(name: str, net: Any) -> None:
    from diffusers import ModelMixin
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(net, ModelMixin) and net._supports_gradient_checkpointing:
        net.enable_gradient_checkpointing()
        return
    layers = [layer for layer in net.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not isinstance(net, PreTrainedModel) or not layers:
        _refuse("gradient_checkpointing", f"the net {name} of this model cannot do that")
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # pyright: ignore[reportArgumentType]
        layer.training = True  # the layer asks for it; what is inside it stays in evaluation mode, without dropout


def _set_attention(family: Family, backend: str) -> None:
    from diffusers import ModelMixin
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [one.value for one in AttentionBackendName]
    if backend not in known:
        raise ValueError(f"model.memory.attention is {backend!r}, but diffusers knows {', '.join(known)}")
    nets: list[Any] = [net for net in family.nets.values() if isinstance(net, ModelMixin)]
    if not nets or not all(map(_chooses_attention, nets)):
        _refuse("attention", "the nets of this model compute attention in one way only")
    for net in nets:
        try:
            net.set_attention_backend(backend)
        except (RuntimeError, ImportError, OSError) as error:  # a package is missing, or a kernel to be downloaded
            raise ValueError(f"model.memory.attention {backend} cannot be used here: {error}") from error


def _chooses_attention(net: nn.Module) -> bool:
    """Whether anything listens: the library passes over processors of its older kind in silence."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    processors = [module.processor for module in net.modules() if isinstance(module, Attention | AttentionModuleMixin)]
    return any(hasattr(processor, "_attention_backend") for processor in processors)


def _ask_vae(family: Family, what: Literal["tiling", "slicing"]) -> None:
    from diffusers.models.autoencoders.vae import AutoencoderMixin

    vae = modules_of(family, f"vae_{what}").get("vae")
    if not isinstance(vae, AutoencoderMixin):
        _refuse(f"vae_{what}", "the VAE of this model cannot do that")
    try:
        vae.enable_tiling() if what == "tiling" else vae.enable_slicing()
    except NotImplementedError:
        _refuse(f"vae_{what}", "the VAE of this model cannot do that")


def modules_of(family: Family, key: str) -> dict[str, nn.Module]:
    """The networks of a family's pipeline by name; ValueError, which names the setting, where it has none."""
    if not isinstance(family, HasPipeline):
        _refuse(key, "this family has no pipeline of diffusers")
    return {name: part for name, part in family.pipeline.components.items() if isinstance(part, nn.Module)}


def networks(family: Family) -> list[nn.Module]:
    """All that a family computes with."""
    if isinstance(family, HasPipeline):
        return [*modules_of(family, "offload").values()]
    return [*family.nets.values()]


def _refuse(key: str, reason: str) -> NoReturn:
    raise ValueError(f"model.memory.{key}: {reason}; leave it out")
