"""Gradients of log-probs row by row, kept instead of their graphs until the advantages are known (arXiv 2609.03528).

    ∇ Σ_i s_i log π_i = Σ_i s_i ∇ log π_i:   the slopes s come later, and what waits for them is ∇ log π_i of each row

A linear layer y = W x + c that sees a row's tokens τ has ∇_W log π_i = Σ_τ (∂ log π_i / ∂ y_τ) x_τᵀ. One backward pass
to the layers' outputs gives it for all rows; rows must not meet in the net. What is kept is as large as the weights, in
every row and step, however many activations the net has: little for adapters, far too much for a whole net.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlalign.types import Graph


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass of a linear layer."""

    layer: nn.Linear
    x: Tensor  # [m * b, ..., in]   m = 2: both halves of guidance
    y: Tensor  # [m * b, ..., out]   with graph


def linear_layers(nets: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> list[nn.Linear]:
    """Those that hold the parameters; ValueError where other layers hold some."""
    wanted = {id(parameter) for parameter in parameters}
    modules = {id(module): module for net in nets for module in net.modules() if isinstance(module, nn.Linear)}
    layers = [m for m in modules.values() if any(id(p) in wanted for p in m.parameters(recurse=False))]
    if len(wanted - {id(p) for layer in layers for p in layer.parameters(recurse=False)}):
        raise ValueError("retain: gradients is for weights of linear layers: train adapters, or set retain: true")
    return layers


@contextmanager
def watched(layers: Sequence[nn.Linear]) -> Generator[list[Pass]]:
    """The passes with a graph that the layers make inside."""
    passes: list[Pass] = []

    def seen(layer: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
        if y.requires_grad:
            assert isinstance(layer, nn.Linear)
            passes.append(Pass(layer, inputs[0].detach(), y))

    hooks = [layer.register_forward_hook(seen) for layer in layers]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def stored(graph: Graph, passes: Sequence[Pass], num_rows: int, doubled: bool) -> Graph:
    """The same log-probs of a micro-batch of ``num_rows``, with their rows' gradients in place of the graph.

    ``doubled``: guidance takes a pass of twice as many rows, both halves in the order of the samples.
    """
    outputs, ones = [one.y for one in passes], torch.ones_like(graph.log_probs)
    slopes = torch.autograd.grad(graph.log_probs, outputs, ones, allow_unused=True)
    found: dict[nn.Parameter, Tensor] = {}
    for one, slope in zip(passes, slopes, strict=True):
        if slope is None:  # pyright: ignore[reportUnnecessaryComparison]  # of another step
            continue
        for parameter, gradient in _of_layer(one, slope, num_rows, doubled):
            rows = gradient[graph.rows]
            found[parameter] = found[parameter] + rows if parameter in found else rows
    with torch.enable_grad():
        log_probs: Tensor = _Stored.apply(graph.log_probs.detach(), [*found.values()], *found)  # pyright: ignore
    return Graph(log_probs, graph.rows, graph.slots)


def _of_layer(one: Pass, slope: Tensor, num_rows: int, doubled: bool) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each trained parameter of the layer with its gradients [b, ...]."""
    halves = len(one.x) // num_rows
    if num_rows > 1 and (len(one.x) % num_rows or halves > 1 + doubled):
        raise ValueError(
            f"retain: gradients: a trained layer sees {len(one.x)} inputs for {num_rows} samples, so it is not known "
            "which belongs to which: set rollout.micro_batch: 1, or retain: true"
        )
    x, y = (t.reshape(-1, num_rows, t[0].numel() // t.shape[-1], t.shape[-1]) for t in (one.x, slope))
    for name, parameter in one.layer.named_parameters(recurse=False):
        if parameter.requires_grad:
            gradient = torch.einsum("mbto,mbti->boi", y, x) if name == "weight" else y.sum((0, 2))
            yield parameter, gradient.to(parameter.dtype)


class _Stored(torch.autograd.Function):
    """log π [n], whose gradient by the parameters is Σ_i s_i g_i of what is stored."""

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return log_probs.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(torch.einsum("n,n...->...", slopes[0].to(g), g) for g in ctx.gradients)
