"""Requests that wait, put together to batches."""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor

from rlalign.types import Prompt

Columns = dict[str, list[float]]
"""The score and every detail, one number a picture."""


class Refusal(Exception):
    """An answer that is no scores: its HTTP status and one sentence."""

    def __init__(self, status: int, sentence: str, retry_after_s: int | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}


Outcome = Columns | Refusal


@dataclass(eq=False, slots=True)
class Job:
    """One request: its pictures, and who waits for the outcome."""

    images: Tensor  # [b, (F,) 3, H, W] uint8
    prompts: Sequence[Prompt]
    since: float
    done: asyncio.Future[Outcome] = field(default_factory=asyncio.Future)
    alone: bool = False  # it was in a call that failed, and it is not known whose fault that was
    deaths: int = 0  # of workers that had it alone

    def finish(self, outcome: Outcome) -> None:
        if not self.done.done():
            self.done.set_result(outcome)


class Queue:
    """First come, first served; pictures of one size share a call."""

    def __init__(self, batch_size: int, wait_s: float) -> None:
        self.batch_size, self.wait_s = batch_size, wait_s
        self.groupwise = False
        self._jobs: deque[Job] = deque()
        self._changed = asyncio.Condition()

    async def put(self, job: Job) -> None:
        async with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()

    async def give_back(self, jobs: Sequence[Job]) -> None:
        """They come before all others, in their old order."""
        async with self._changed:
            self._jobs.extendleft(reversed(jobs))
            self._changed.notify_all()

    async def take(self) -> list[Job]:
        """The oldest request and others that fit into its call; waits a little for those, as long as it is not full."""
        async with self._changed:
            while True:
                await self._changed.wait_for(lambda: self._jobs)
                batch, full = self._next()
                left = batch[0].since + self.wait_s - asyncio.get_running_loop().time()
                if full or left <= 0:
                    for job in batch:
                        self._jobs.remove(job)
                    return batch
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._changed.wait()

    def empty(self) -> list[Job]:
        jobs = [*self._jobs]
        self._jobs.clear()
        return jobs

    def _next(self) -> tuple[list[Job], bool]:
        first = self._jobs[0]
        batch, room = [first], self.batch_size - len(first.images)
        if first.alone or self.groupwise:
            return batch, True
        for job in list(self._jobs)[1:]:
            if job.alone or job.images.shape[1:] != first.images.shape[1:]:
                continue
            if len(job.images) > room:
                return batch, True
            batch.append(job)
            room -= len(job.images)
        return batch, room <= 0
