"""How large the parts of a pipeline are, without loading them: from the headers of their files, or from their configs.

A folder with nothing but the configs of a model is enough: a part without weights is made on torch's meta device, which
takes no memory.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlalign.models.lora import LoraConfig, targets_of

Shapes = Mapping[str, Sequence[int]]
"""Of a part's weights, by name."""

BLOCK, RESNET, UNET_BLOCK = 28, 11, 38
"""Numbers that the backward pass keeps for each token and channel: of a block of a transformer, of a residual block and
of a transformer block of a UNet. Counted on the meta device with fused attention taken for granted: FLUX 26, Qwen-Image
26, SD3.5 22, Wan 40; the UNets of SD 1.5 and SDXL fit both of theirs."""
DECODER = 6
"""Numbers for each pixel and first channel that AutoencoderKL holds at the worst moment, counted the same way."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a folder tells of a pipeline."""

    folder: Path
    parts: Mapping[str, Shapes]
    unknown: tuple[str, ...] = ()  # parts that have neither weights in safetensors nor a config that could be used
    has_weights: bool = True  # of all parts that are known

    def numel(self, part: str) -> int:
        return sum(map(math.prod, self.parts[part].values()))

    def config(self, part: str) -> dict[str, Any]:
        path = self.folder / part / "config.json"
        return json.loads(path.read_text()) if path.is_file() else {}


def found(path: str) -> Path | None:
    """The folder of a model; of a Hub id that was downloaded once. Nothing is downloaded."""
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") != 1 or Path(path).is_absolute():
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def read(folder: Path, without: Iterable[str] = ()) -> Model | None:
    """None for what is no pipeline of diffusers. ``without`` are parts that are not loaded."""
    index = folder / "model_index.json"
    if not index.is_file():
        return None
    classes = json.loads(index.read_text())
    parts: dict[str, Shapes] = {}
    unknown: list[str] = []
    has_weights = True
    for part, entry in classes.items():
        if part in ("scheduler", "safety_checker", *without) or not isinstance(entry, list) or entry[0] is None:
            continue
        place = folder / part
        if shapes := _headers(place):
            parts[part] = shapes
        elif (place / "config.json").is_file():
            shapes, has_weights = _on_meta(entry[0], entry[1], place), False
            if shapes is None:
                unknown.append(part)
            else:
                parts[part] = shapes
    return Model(folder, parts, tuple(unknown), has_weights)


def trained(shapes: Shapes, net: str, lora: LoraConfig | None, family_targets: Sequence[str]) -> int:
    """How many numbers train in a net of these shapes."""
    if lora is None:
        return sum(map(math.prod, shapes.values()))
    ends = tuple(f"{target}.weight" for target in targets_of(lora, net, family_targets))
    adapted = [shape for name, shape in shapes.items() if f".{name}".endswith(tuple(f".{end}" for end in ends))]
    return sum(lora.rank * (shape[0] + math.prod(shape[1:])) for shape in adapted)


def kept_numbers(model: Model, net: str, size: Sequence[int], text_tokens: int, checkpointing: bool) -> int | None:
    """What the backward pass of one row through the net keeps; an estimate, None for kinds of nets that are strange."""
    config, factors = model.config(net), _pixels_a_latent(model.config("vae"))
    if factors is None:
        return None
    side, length = factors
    height, width, frames = size[0] // side, size[1] // side, (size[2] - 1) // length + 1 if len(size) > 2 else 1
    if "down_block_types" in config:
        return _of_unet(config, height * width, checkpointing)
    layers = sum(config.get(name) or 0 for name in ("num_layers", "num_single_layers", "n_layers"))
    channels = config.get("dim") or (config.get("num_attention_heads") or 0) * (config.get("attention_head_dim") or 0)
    if not layers or not channels:
        return None
    packed = config.get("in_channels") == 4 * _latent_channels(model.config("vae"))
    patch = config.get("patch_size") or 2
    edge = 2 if packed else patch[-1] if isinstance(patch, list) else patch
    one = (frames * height * width // edge**2 + text_tokens) * channels
    return one * (layers + BLOCK) if checkpointing else one * layers * BLOCK


def decoded_numbers(model: Model, size: Sequence[int]) -> int | None:
    """What decoding one row holds at the worst moment, frame by frame; an estimate."""
    channels = model.config("vae").get("block_out_channels")
    return DECODER * size[0] * size[1] * channels[0] if channels else None


def _of_unet(config: Mapping[str, Any], latents: int, checkpointing: bool) -> int:
    channels, depth = config["block_out_channels"], config.get("transformer_layers_per_block", 1)
    depths = depth if isinstance(depth, list) else [depth] * len(channels)
    crossed = ["CrossAttn" in kind for kind in config["down_block_types"]]
    passes = 2 * config.get("layers_per_block", 2) + 1  # on the way down and up again
    levels = [
        (latents * width // 4**level, deep if attends else 0)
        for level, (width, deep, attends) in enumerate(zip(channels, depths, crossed, strict=True))
    ]
    if checkpointing:  # the inputs of blocks, and one block that is made again
        inputs = sum(numbers * passes * (2 + deep) for numbers, deep in levels)
        return inputs + max(numbers * (UNET_BLOCK if deep else RESNET) for numbers, deep in levels)
    return sum(numbers * passes * (RESNET + UNET_BLOCK * deep) for numbers, deep in levels)


def _pixels_a_latent(vae: Mapping[str, Any]) -> tuple[int, int] | None:
    """Of a side, and frames of a film, by the VAE's config as its class reads it."""
    side = vae.get("scale_factor_spatial") or vae.get("spatial_compression_ratio")
    length = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    widths = vae.get("block_out_channels") or vae.get("encoder_block_out_channels")
    if halved := vae.get("temperal_downsample"):  # Wan's and Qwen-Image's
        return side or 2 ** len(halved), length or 2 ** sum(halved)
    if scaled := vae.get("spatio_temporal_scaling"):  # LTX's
        return side or vae["patch_size"] * 2 ** sum(scaled), length or vae["patch_size_t"] * 2 ** sum(scaled)
    side = side or (2 ** (len(widths) - 1) if widths else None)
    return (side, length or 4) if side else None


def _latent_channels(vae: Mapping[str, Any]) -> int:
    return vae.get("latent_channels") or vae.get("z_dim") or 0


def _headers(folder: Path) -> dict[str, list[int]]:
    """Shapes by name, of the files that the library would read."""
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if ".fp16." in path.name:
            continue  # the same weights once more
        shapes |= {name: entry["shape"] for name, entry in _header(path).items() if name != "__metadata__"}
    return shapes


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        beginning = file.read(8)
        length = struct.unpack("<Q", beginning)[0] if len(beginning) == 8 else 0
        if 0 < length <= path.stat().st_size - 8:
            with suppress(ValueError):
                return json.loads(file.read(length))
    pointer = ", but what git-lfs leaves in its place: run git lfs pull there" if beginning == b"version " else ""
    raise ValueError(f"{path} is no whole file of safetensors{pointer}")


def _on_meta(library: str, name: str, folder: Path) -> dict[str, list[int]] | None:
    """None for classes that neither library has."""
    import diffusers
    import transformers

    known = {"diffusers": diffusers, "transformers": transformers}.get(library)
    if known is None or not hasattr(known, name):
        return None
    kind: Any = getattr(known, name)
    with torch.device("meta"):
        if known is diffusers:
            net: Any = kind.from_config(json.loads((folder / "config.json").read_text()))
        else:
            net = kind(kind.config_class.from_pretrained(folder))
    tied = {name for name, _ in net.named_parameters(remove_duplicate=False)} - {n for n, _ in net.named_parameters()}
    return {name: list(tensor.shape) for name, tensor in net.state_dict().items() if name not in tied}
