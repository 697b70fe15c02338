"""What encoded prompts depend on besides the prompt, as one hash: by it they are found again on disk."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import xxhash
from torch import Tensor

from rlalign.models.base import Family, HasPipeline
from rlalign.models.memory import modules_of


@dataclass(frozen=True, slots=True)
class Embeddings:
    """A folder of encoded prompts, and whose of them are this model's."""

    folder: Path
    identity: str


def identity(family: Family, told: Mapping[str, Any], device: torch.device) -> str:
    """Of the weights, tokenizers and code that encode, the settings ``told``, the libraries and the kind of device.

    The weights themselves count, not their path: one read of them all, 25 GB/s where they are in CPU memory.
    """
    import diffusers
    import transformers

    import rlalign

    nets = modules_of(family, "embeddings")
    encoders = {name: net for name, net in nets.items() if name not in family.nets or name.startswith("text_encoder")}
    cpu = f" with {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    parts = {
        "told": dict(told),
        "weights": {name: fingerprint(net.state_dict()) for name, net in sorted(encoders.items())},
        "tokenizers": dict(_tokenizers(family)),
        "family": hashlib.sha256(Path(inspect.getfile(type(family))).read_bytes()).hexdigest(),
        "versions": [module.__version__ for module in (rlalign, torch, diffusers, transformers)],
        "device": f"{device.type}{cpu}",
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """xxh3, 128 bits, of names, shapes, dtypes and bytes."""
    total = xxhash.xxh3_128()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _tokenizers(family: Family) -> Iterator[tuple[str, str]]:
    """Tokenizers and processors by what they write; the scheduler encodes nothing."""
    assert isinstance(family, HasPipeline)
    for name, part in sorted(family.pipeline.components.items()):
        if part is None or isinstance(part, torch.nn.Module) or name == "scheduler":
            continue
        with TemporaryDirectory() as folder:
            part.save_pretrained(folder)
            files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
            yield name, xxhash.xxh3_128(b"".join(path.read_bytes() for path in files)).hexdigest()
