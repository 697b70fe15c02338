"""How values travel between processes: tensors as contiguous NumPy arrays, which readers map instead of copying.

A torch tensor would go through a copying pickle, a hundred times slower (RUNTIME.md 1.2). What arrives is read-only:
it lies in memory that other processes read too.
"""

import pickle
import warnings
from typing import Any

import numpy as np
import ray.util
import torch
from torch import Tensor

Packed = tuple[np.ndarray[Any, Any], str | None]


def register() -> None:
    """In every process of the run, once Ray is connected."""
    ray.util.register_serializer(Tensor, serializer=packed, deserializer=unpacked)


def packed(tensor: Tensor) -> Packed:
    """Any device, layout and dtype; those that NumPy lacks, such as bfloat16, go as bytes."""
    tensor = tensor.detach().cpu().contiguous()
    try:
        return tensor.numpy(), None
    except TypeError:
        flat = tensor.reshape(-1).view(torch.uint8).reshape(*tensor.shape, tensor.itemsize)
        return flat.numpy(), str(tensor.dtype).removeprefix("torch.")


def unpacked(data: Packed) -> Tensor:
    array, dtype = data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the memory is not ours to write
        tensor = torch.from_numpy(array)
    return tensor if dtype is None else tensor.reshape(-1).view(getattr(torch, dtype)).reshape(array.shape[:-1])


def num_bytes(value: Any) -> int:
    """Of the tensors, bytes and texts in a value that a worker returns."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(num_bytes, value))
    if hasattr(value, "__dataclass_fields__"):
        return sum(num_bytes(getattr(value, name)) for name in value.__dataclass_fields__)
    return 0


def can_travel(error: BaseException) -> BaseException:
    """The error itself, or its words where it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
