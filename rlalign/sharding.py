"""Tensors in parts, one on every rank: FSDP2 for any net, and files that any number of ranks can read again.

The files are safetensors by torch.distributed.checkpoint: no pickle anywhere. Its modules take seconds to import, so
only functions that need them do.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from warnings import catch_warnings, filterwarnings

import torch
from torch import Tensor, nn


def shard(net: nn.Module, mesh: Any) -> None:
    """FSDP2: what stands in the net's outermost lists (its blocks) one by one, then the rest, in place.

    Gradients are summed over the ranks of the mesh. Every pass of the net ends with nothing gathered, the root's
    parameters neither, so that the parts are free to be changed between two passes.
    """
    from torch.distributed.fsdp import fully_shard

    for module in [*blocks(net), net]:
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from blocks(child)


def cut(tensor: Tensor, like: Any) -> Tensor:
    """The part of a whole tensor that this rank has of ``like``; one that is in parts already stays as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensor: Any) -> Tensor:
    """The whole of a tensor in parts; every rank has to ask."""
    return tensor.full_tensor()


@torch.no_grad()
def swap(ones: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Exchanges the contents of this rank's parts."""
    for key, tensor in ones.items():
        one, other = tensor.to_local(), others[key].to_local()
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


def save(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Every rank writes its parts, durably, and has to call; what is whole is written once."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as write

    with _plain_exceptions():
        write(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def files_of(folder: Path, rank: int) -> list[Path]:
    """What ``save`` wrote there on this rank: one file, or none where others hold everything."""
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


def load(folder: Path, prefix: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names begin with ``prefix``, from files by ``save`` or any others of safetensors.

    Whole, on the CPU; or this rank's part where ``like`` has a tensor in parts under the name. Each rank reads alone.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as fill

    reader = HuggingFaceStorageReader(str(folder))
    found: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty_like(like[name]) if name in like else torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if name.startswith(prefix)
    }
    with _plain_exceptions(), catch_warnings():
        filterwarnings("ignore", "torch.distributed is disabled")  # as meant
        fill(tensors, storage_reader=reader, no_dist=True)
    return tensors


@contextmanager
def _plain_exceptions() -> Iterator[None]:
    """What went wrong, in place of a CheckpointException: that is no Exception, so nobody would catch it."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(cause for cause, _ in error.failures.values()) from error
