"""What rewards with a network share: finding its weights, placing it, bringing pictures to its size."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlalign.types import Prompt

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_Loaded = TypeVar("_Loaded")
_Network = TypeVar("_Network", bound=nn.Module)


def placed(network: _Network, device: str | None, dtype: str) -> _Network:
    """Frozen, in evaluation mode, on `device` (a GPU where there is one unless given)."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return network.requires_grad_(False).eval().to(device, _DTYPES[dtype])


def from_hub(name: str, load: Callable[[str], _Loaded], fetch: str | None = None) -> _Loaded:
    """What `load` makes of a path or of a name on the hub; ValueError in one sentence where it is not to be had.

    `fetch` is the command that gets it where there is a network, `hf download` unless given.
    """
    if _is_path(name) and not Path(name).expanduser().exists():
        raise ValueError(f"there is no {name}")
    try:
        return load(str(Path(name).expanduser()) if _is_path(name) else name)
    except (OSError, RuntimeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{name} could not be loaded, neither from this machine nor from the hub ({first:.200}); give the path "
            f"of a local copy, or run `{fetch or f'hf download {name}'}` where there is a network"
        ) from error


def weights_file(name: str, file: str) -> Path:
    """A local file as it is; of a folder or of a repository on the hub its `file`."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / file
    if path.is_file():
        return path
    if _is_path(name):
        raise ValueError(f"there is no {path}")
    return from_hub(name, lambda repository: _fetched(repository, file))


def state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, of a .safetensors file or of torch's own format without other pickled objects."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} holds no weights that can be read safely: {type(error).__name__}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no table of tensors")
    return dict(state)


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What stands below a dotted name, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def fill(network: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Every parameter from `state`, what else it holds is left alone; ValueError where one is missing or misshapen."""
    try:
        missing = network.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        raise ValueError(f"{source} belongs to another architecture: {str(error).splitlines()[-1].strip()}") from error
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} tensors of this network, the first is {missing[0]!r}")


def rating_head(width: int) -> nn.Sequential:
    """Of LAION's predictor and of ImageReward: linear. Dropout does nothing here but keeps the published numbering."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def over_frames(
    score: Callable[[Tensor, Sequence[Prompt]], Tensor], images: Tensor, prompts: Sequence[Prompt]
) -> Tensor:
    """The scores of pictures [B, 3, H, W]; of videos [B, F, 3, H, W] the mean over their frames. On images' device."""
    frames = images.flatten(0, -4)  # [B (* F), 3, H, W]
    repeated = [prompt for prompt in prompts for _ in range(len(frames) // len(images))]
    return score(frames, repeated).float().reshape(len(images), -1).mean(1).to(images.device)


def cropped(images: Tensor, size: int, shortest: int | None = None, mode: str = "bicubic") -> Tensor:
    """The shortest side brought to `shortest` (else `size`) and the middle cut out, as CLIP's processors do.

    Differentiable. images: float [B, 3, H, W] in [0, 1]. Pillow rounds to 8 bits after either axis, this does not:
    they agree to 2/255. Where the rest is odd it lies right and below, as in transformers.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    target = shortest or size
    images = resized(images, target * height // short, target * width // short, mode)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def padded(images: Tensor, size: int) -> Tensor:
    """The longest side brought to `size`, bicubic, black around. Differentiable; images as for `cropped`."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resized(images, round(height * scale), round(width * scale))
    rest_h, rest_w = size - images.shape[-2], size - images.shape[-1]
    return F.pad(images, (rest_w // 2, rest_w - rest_w // 2, rest_h // 2, rest_h - rest_h // 2))


def resized(images: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Antialiased, as Pillow does it. Differentiable; images: float [B, 3, H, W] in [0, 1]"""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode=mode, antialias=True).clamp(0, 1)


def normalised(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """(images - mean) / std by channel."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


def unit(features: Tensor) -> Tensor:
    """Of length one, in float32. features: [..., D]"""
    return F.normalize(features.float(), dim=-1)


def _is_path(name: str) -> bool:
    """Whether it can be no name of the hub, which is `owner/repository`, or is there."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()


def _fetched(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, file))
