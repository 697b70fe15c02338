"""Lines that load what was exported, for its model card."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from rlalign.models.lora import adapter_of, encoders_among, takes_adapters

FIRST = ("transformer", "unet")
PIPELINE = "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({place!r}{absent})"
BY_PEFT = """\
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file

config = LoraConfig(r={rank}, lora_alpha={alpha:g}, target_modules={targets})
tensors = {{key.removeprefix("{name}."): tensor for key, tensor in load_file({file}).items()}}
inject_adapter_in_model(config, pipe.{name})
set_peft_model_state_dict(pipe.{name}, tensors)"""


def of_pipeline(place: str, folder: Path | None) -> str:
    """``place`` is a folder or a repository of the Hub, ``folder`` where its files lie, if that is known."""
    return PIPELINE.format(place=place, absent="".join(f", {name}=None" for name in _absent(folder)))


def _absent(folder: Path | None) -> list[str]:
    """Text encoders that the pipeline has not, which its library wants to be told."""
    if folder is None or not (index := folder / "model_index.json").is_file():
        return []
    parts = json.loads(index.read_bytes())
    return [n for n, part in parts.items() if n.startswith(("text_encoder", "tokenizer")) and part == [None, None]]


def of_lora(pipeline: str, place: str, on_hub: bool, file: str, nets: Mapping[str, nn.Module]) -> str:
    """``pipeline`` are the lines that load the base model, ``nets`` those with adapters, by name.

    ``load_lora_weights`` reads the first net's adapters and its text encoders', and some nets of diffusers take
    adapters from peft only. ``place`` is the folder of the file, or its repository of the Hub.
    """
    first = any(name in FIRST and takes_adapters(net) for name, net in nets.items())
    read_along = encoders_among(nets) if first else []
    calls = [_of_net(name, net, place, on_hub, file) for name, net in nets.items() if name not in read_along]
    return "\n".join([pipeline, *calls])


def _of_net(name: str, net: nn.Module, place: str, on_hub: bool, file: str) -> str:
    if not takes_adapters(net):
        config = adapter_of(net)
        numbers = {"rank": config.r, "alpha": config.lora_alpha, "targets": sorted(config.target_modules)}
        if on_hub:
            fetched = f"hf_hub_download({place!r}, {file!r})"
            return f"from huggingface_hub import hf_hub_download\n{BY_PEFT.format(name=name, file=fetched, **numbers)}"
        return BY_PEFT.format(name=name, file=repr(str(Path(place, file))), **numbers)
    if name in FIRST:
        return f"pipe.load_lora_weights({place!r}, weight_name={file!r})"
    return f'pipe.{name}.load_lora_adapter({place!r}, prefix="{name}", weight_name={file!r}, use_safetensors=True)'


def of_single_file(lora: bool, file: Path) -> str:
    return f"copy {file.name} to ComfyUI/models/{'loras' if lora else 'diffusion_models'}"
