"""What a reward returned, turned into tensors or refused in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


class CallFailed(Exception):
    """A call gave nothing that can be used; the message completes "the reward failed: "."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A call's numbers; NaN and infinity are still in them."""

    score: Tensor  # [b] float32
    details: dict[str, Tensor]  # each [b] float32


def checked(result: object, rows: int) -> Answer:
    """CallFailed unless there is one number a row."""
    if not isinstance(result, Mapping):
        return Answer(_numbers(result, rows, "it returned"), {})
    if "score" not in result:
        raise CallFailed(f"it returned a dict without 'score'; its keys are {list(result)}")
    details = {str(key): _numbers(value, rows, f"it returned {key!r} as") for key, value in result.items()}
    return Answer(details.pop("score"), details)


def _numbers(value: object, rows: int, said: str) -> Tensor:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Tensor):
        numbers = _real(value.detach().cpu(), said)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        numbers = _listed(value, said)
    else:
        raise CallFailed(f"{said} {_short(value)}, not one number for each of {rows} pictures")
    if numbers.shape != (rows,):
        raise CallFailed(f"{said} {_counted(numbers)} for {rows} pictures")
    return numbers.float()


def _real(tensor: Tensor, said: str) -> Tensor:
    if tensor.is_complex():
        raise CallFailed(f"{said} complex numbers")
    return tensor


def _listed(values: Sequence[object], said: str) -> Tensor:
    for value in values:
        if isinstance(value, str | bytes | list | tuple | None):
            raise CallFailed(f"{said} a list with {_short(value)} in it, not numbers alone")
    try:
        return torch.tensor([float(value) for value in values], dtype=torch.float64)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CallFailed(f"{said} a list that is not numbers alone: {error}") from None


def _counted(numbers: Tensor) -> str:
    return f"{len(numbers)} numbers" if numbers.ndim == 1 else f"a tensor of shape {list(numbers.shape)}"


def _short(value: object) -> str:
    return f"{value!r:.60}" if isinstance(value, str | bytes | int | float | None) else f"a {type(value).__name__}"
