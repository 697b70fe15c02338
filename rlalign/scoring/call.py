"""One call of a reward: within its time, its answer checked."""

import asyncio
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.scoring.answer import Answer, CallFailed, checked
from rlalign.scoring.protocol import Reward
from rlalign.types import Prompt


class TimedOut(CallFailed):
    """No answer in time."""


class LeftBehind(TimedOut):
    """No answer in time, and the thread that was to give it still runs."""


class Spent(Exception):
    """This process is full, or holds a call that never ended; a new one may do better with the same work."""


def spends(error: BaseException) -> bool:
    """Whether a process in which something ended so should be replaced. torch and threads have no MemoryError."""
    full = isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)
    return full or isinstance(error, LeftBehind | MemoryError)


_CANCEL_S = 1.0
_FULL = ("DefaultCPUAllocator", "can't start new thread")


def call(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Answer:
    """Raises CallFailed, or whatever the reward raises. images: uint8 [b, ...], the reward's own to write into"""
    config = reward.config
    if config.apart:  # it keeps its time, which a thread cannot: loading anew may take longer than a call
        return checked(reward.function(images, prompts), len(prompts))
    # The clock of a coroutine starts a moment later, and it takes a moment to end.
    spare = _CANCEL_S if _is_coroutine(reward.function) else 0.0
    pictures = images / 255 if reward.differentiable else images

    def work() -> object:
        with torch.no_grad():  # grad mode belongs to the thread
            result = reward.function(pictures, prompts)
        return asyncio.run(_awaited(result, config.timeout_s)) if inspect.isawaitable(result) else result

    return checked(within(config.timeout_s, work, f"reward {config.name}", spare), len(prompts))


def within(seconds: float, work: Callable[[], object], name: str, spare: float = 0.0) -> object:
    """What `work` returns or raises in a thread called `name`; `LeftBehind` if it is late, and not ended in `spare`."""
    outcome: queue.SimpleQueue[tuple[object, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:
            outcome.put((None, error))

    threading.Thread(target=run, name=name, daemon=True).start()  # daemon: what hangs must not hold up the exit
    try:
        result, error = outcome.get(timeout=seconds + spare)
    except queue.Empty:
        raise LeftBehind(f"no answer within {seconds:g} s; its thread {name!r} is left behind") from None
    if isinstance(error, Exception):
        raise error
    if error is not None:  # SystemExit and its like end the program, which is not a reward's business
        raise CallFailed(f"it raised {type(error).__name__}") from error
    return result


def _is_coroutine(function: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def _awaited(result: Awaitable[Any], seconds: float) -> object:
    """Unlike a thread, a coroutine can be ended at its timeout."""
    try:
        async with asyncio.timeout(seconds) as limit:
            with torch.no_grad():
                return await result
    except TimeoutError:
        if limit.expired():
            raise TimedOut(f"no answer within {seconds:g} s") from None
        raise
