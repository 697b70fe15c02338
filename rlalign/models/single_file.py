"""One file of weights for ComfyUI and its kind.

diffusers turns their files into its own layout; of ways back it has one, for the LoRA of a UNet. But ComfyUI reads some
layouts of diffusers, those of the classes below (its comfy/lora.py and comfy/model_detection.py, 2026). What it does
not read is refused.

Such programs know nothing of diffusers' metadata: the adapters' scale is multiplied into them, so that alpha is rank.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from rlalign.models.lora import ADAPTER, METADATA, adapter_of, merged, metadata_of

KOHYA = ("UNet2DConditionModel",)
"""Their adapters are read under the names that kohya's scripts made common."""
DIFFUSERS = (
    "FluxTransformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "ZImageTransformer2DModel",
)
"""Their adapters are read under the names that diffusers gives them."""


def readable_net(nets: Mapping[str, nn.Module], trained: Sequence[str]) -> str:
    """The one net that trained; ValueError where other programs would not read it."""
    if len(trained) != 1 or trained[0] not in ("transformer", "unet"):
        raise ValueError(
            f"--single-file holds one transformer or unet, and this run trained {', '.join(trained)}; export without it"
        )
    kind = type(nets[trained[0]]).__name__
    if kind not in (*KOHYA, *DIFFUSERS):
        raise ValueError(
            f"no single file of a {kind} is known to be read elsewhere: diffusers cannot convert it, and ComfyUI does "
            "not read its layout; export without --single-file"
        )
    return trained[0]


def save_single_lora(name: str, net: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> Path:
    """Adapter weights of the net called ``name``, as kohya names those of UNets and diffusers all others."""
    config = adapter_of(net)
    scale = config.lora_alpha / config.r
    plain = {key.replace(f".{ADAPTER}.", "."): tensor for key, tensor in tensors.items()}
    state = {key: tensor * scale if ".lora_B." in key else tensor for key, tensor in plain.items()}
    if type(net).__name__ in KOHYA:
        from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

        return _written(convert_state_dict_to_kohya(state), file)
    return _written(state, file, {METADATA: json.dumps(metadata_of(name, config, config.r))})


def save_single_net(net: nn.Module, file: Path) -> Path:
    """All weights of the net, adapters added into them, under the names of diffusers."""
    return _written(merged({"net": net})["net"].state_dict(), file)


def _written(state: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, file, {"format": "pt", **(metadata or {})})
    return file
