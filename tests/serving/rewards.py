"""Rewards for a service under test: they count what they score in a file, and do what a prompt tells them."""

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlalign.types import Prompt


def numbers_of(images: Tensor) -> list[int]:
    """Pictures that name themselves: red and green are the digits of their number."""
    first = images[:, 0] if images.ndim == 5 else images  # of a video the first frame
    return [int(image[0, 0, 0]) * 256 + int(image[1, 0, 0]) for image in first]


def numbered(numbers: Sequence[int], size: int = 8) -> Tensor:
    """uint8 [b, 3, size, size]"""
    colours = torch.tensor([[number // 256, number % 256, 0] for number in numbers], dtype=torch.uint8)
    return colours[:, :, None, None].expand(-1, -1, size, size).clone()


class Counted:
    """Writes the number of every picture that it scores into a file of its folder, as its last deed."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Any]:
        for prompt in prompts:
            self.obey(prompt.text)
        numbers = numbers_of(images)
        with (self.folder / "scored").open("ab", buffering=0) as file:
            file.write(b"".join(b"%d\n" % number for number in numbers))  # all or nothing
        return {"score": numbers, "pid": [os.getpid()] * len(numbers), "together": [len(numbers)] * len(numbers)}

    def obey(self, order: str) -> None:
        if order == "raise":
            raise ValueError("this picture\nis ugly")
        if order == "hang":
            time.sleep(3600)
        if order == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "fork and die":
            helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
            helper.start()
            with (self.folder / "helpers").open("a") as file:
                file.write(f"{helper.pid}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        if order == "hang once" and not self.marked("hanging"):
            time.sleep(3600)
        if order == "wait":
            self.marked("waiting")
            while not (self.folder / "go").exists():
                time.sleep(0.01)

    def marked(self, name: str) -> bool:
        """Whether somebody was here before; leaves its pid for the test."""
        draft, mark = self.folder / f"{name}.{os.getpid()}", self.folder / name
        draft.write_text(str(os.getpid()))
        try:
            os.link(draft, mark)
        except FileExistsError:
            return True
        return False


class Broken:
    def __init__(self) -> None:
        raise FileNotFoundError("no weights here")
