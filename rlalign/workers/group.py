"""The ranks that train together: one process group of torch.distributed, or a single process without any."""

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

T = TypeVar("T")

_served: list[TCPStore] = []  # by this process, as long as it lives


class Group:
    """``Group()`` is a rank on its own: nothing is sent anywhere. ``Group.join`` makes one of several."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)

    @staticmethod
    def address(host: str | None = None) -> str:
        """Where ranks find each other, "host:port": served from now on by this process, until it ends."""
        host = host or own_address()
        _served.append(TCPStore(host, 0, is_master=True, wait_for_workers=False))
        return f"{host}:{_served[-1].port}"

    @staticmethod
    def join(address: str, rank: int, size: int, device: torch.device | str, timeout: float = 1800.0) -> "Group":
        """Returns once all ``size`` ranks are there; any later exchange fails when one is missing for ``timeout`` s.

        ``address`` is what `Group.address` said in a process that still lives, such as that of rank 0.

        gloo between CPUs, NCCL between GPUs, gloo beside it for what lies in CPU memory.
        """
        device = torch.device(device)
        if size == 1:
            return Group(device=device)
        if device.index is not None:
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        host, _, port = address.rpartition(":")
        patience = timedelta(seconds=timeout)
        store = TCPStore(host, int(port), is_master=False, timeout=patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        return Group(rank, size, device)

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def mesh(self) -> Any:
        """All ranks in a row, for FSDP2."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.size,))

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks, in one exchange a dtype; all ranks get the same bits."""
        if self.size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            own = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in own])
            dist.all_reduce(flat)
            for tensor, part in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, by rank; small plain values. Also a barrier."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


@torch.no_grad()
def sum_gradients(group: Group, parameters: Sequence[nn.Parameter]) -> None:
    """Over the ranks, in one exchange. A parameter that has no gradient on any rank is left without one."""
    has_one = torch.tensor([parameter.grad is not None for parameter in parameters]).to(parameters[0])
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    group.sum([*gradients, has_one])
    for parameter, gradient, number in zip(parameters, gradients, has_one.tolist(), strict=True):
        parameter.grad = gradient if number else None


def exchange_failed(error: BaseException) -> bool:
    """Whether the ranks lost each other, rather than that one of them could not compute; gloo's have no type."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/" in str(error))


def own_address(other: tuple[str, int] = ("192.0.2.1", 9)) -> str:
    """By which this machine reaches the other one, and so others reach it; nothing is sent to find out.

    The default is an address set aside for examples, where nobody is.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(other)
            return probe.getsockname()[0]
    except OSError:  # no route to anywhere
        return "127.0.0.1"
