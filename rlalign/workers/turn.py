"""A worker's turn on a GPU that it shares: outside of it, everything that it has there waits in CPU memory."""

import torch

from rlalign.policy import Policy
from rlalign.workers.optimizer import Optimizer


class Turn:
    """Taken by every call that computes, and left when the other worker's begins."""

    def __init__(self, policy: Policy, optimizer: Optimizer | None = None) -> None:
        self.policy, self.optimizer = policy, optimizer
        self.taken = True

    def take(self) -> None:
        if not self.taken:
            self._move(self.policy.device)
        self.taken = True

    def leave(self) -> None:
        if self.taken:
            self._move("cpu")
            if self.policy.device.type == "cuda":
                torch.cuda.empty_cache()  # what is only cached is taken from the other process, too
        self.taken = False

    def _move(self, device: torch.device | str) -> None:
        self.policy.move(device)
        if self.optimizer is not None:
            self.optimizer.move(device)
