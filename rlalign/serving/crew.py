"""The worker processes of a reward service. One that dies or hangs is replaced, and what it was at is scored by others.

A request is scored again only where its call did not come to an end: the worker died in it, or it failed together with
others, which then are asked one by one. What was answered is never asked again.
"""

import asyncio
import json
import logging
import os
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlalign.scoring import RewardConfig, frames, wire
from rlalign.scoring.apart import CHILD, END_S, GRACE_S, LOAD_S, POISON, kill
from rlalign.serving.batches import Columns, Job, Outcome, Queue, Refusal
from rlalign.serving.config import ServeConfig
from rlalign.serving.meters import Meters
from rlalign.types import Prompt

logger = logging.getLogger("rlalign")

GIVE_UP_AFTER = 6  # times in a row that a worker may die without finishing a call
LONGEST_PAUSE_S = 30.0
DEAD = (OSError, asyncio.IncompleteReadError)


class Crew:
    """Made inside of the event loop."""

    def __init__(self, reward: RewardConfig, folder: Path, config: ServeConfig, meters: Meters) -> None:
        self.config, self.meters = config, meters
        self.lost: asyncio.Future[str] = asyncio.Future()  # why no worker is left
        self._reward, self._folder = reward, folder
        self._queue = Queue(config.batch_size, config.batch_wait_s)
        self._jobs: set[Job] = set()
        self._up: dict[int, Process] = {}
        self._seats: list[asyncio.Task[None]] = []

    @property
    def groupwise(self) -> bool:
        return self._queue.groupwise

    @property
    def pids(self) -> list[int]:
        """Of the workers that are up."""
        return [process.pid for process in self._up.values()]

    async def start(self) -> None:
        """Returns when all workers have loaded the reward; ValueError, one sentence, when they cannot."""
        try:
            async with asyncio.TaskGroup() as starts:
                for number in range(self.config.workers):
                    starts.create_task(self._start(number))
        except* DEAD:
            raise ValueError("a worker process ended while it loaded the reward; its last words stand above") from None
        except* ValueError as refused:
            raise refused.exceptions[0] from None
        self._seats = [asyncio.create_task(self._keep(number)) for number in range(self.config.workers)]

    async def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Outcome:
        if self.lost.done():
            return Refusal(503, self.lost.result())
        job = Job(images, prompts, asyncio.get_running_loop().time())
        self._jobs.add(job)
        try:
            await self._queue.put(job)
            return await job.done
        finally:
            self._jobs.discard(job)

    async def close(self) -> None:
        """Workers end after the calls that they are at; what nobody came to is refused."""
        for seat in self._seats:
            seat.cancel()
        await asyncio.gather(*self._seats, return_exceptions=True)
        await asyncio.gather(*(self._end(number) for number in [*self._up]))
        for job in self._jobs:
            job.finish(Refusal(503, "the server ended before it came to this request", 5))

    # --- life of a worker

    async def _start(self, number: int) -> None:
        environment = {**os.environ}
        if self.config.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.config.gpus[number % len(self.config.gpus)]
        command = (sys.executable, *CHILD)
        # A session of its own: Ctrl-C is for the front, which lets workers finish.
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, env=environment, start_new_session=True
        )
        self._up[number] = process
        told = {
            "reward": self._reward.model_dump(mode="json"),
            "folder": str(self._folder.absolute()),
            "threads": self.config.threads,
        }
        try:
            async with asyncio.timeout(LOAD_S):
                hello = await self._exchange(process, json.dumps(told).encode())
        except (asyncio.CancelledError, TimeoutError):  # while it still imports and loads, which can take long
            kill(process.pid)
            raise
        if "refused" in hello:
            raise ValueError(hello["refused"])
        self._queue.groupwise = hello["groupwise"]
        self.meters.workers.set(len(self._up))

    async def _end(self, number: int) -> int | None:
        """Its input ends, so it does after the call that it is at, and what it started with it; its exit code."""
        process = self._up.pop(number, None)
        self.meters.workers.set(len(self._up))
        if process is None:
            return None
        assert process.stdin is not None
        process.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await process.wait()
        kill(process.pid)
        return await process.wait()  # which returns when nobody holds the pipes any more

    async def _keep(self, number: int) -> None:
        """One worker after the other, until too many of them died in a row."""
        failures = 0
        while failures < GIVE_UP_AFTER:
            if number in self._up:
                failures = 0 if await self._work(self._up[number]) else failures + 1
                code = await self._end(number)
                logger.warning("worker %d ended (exit code %s); it is replaced", number, code)
            await asyncio.sleep(min(LONGEST_PAUSE_S, 2.0 ** (failures - 2)) if failures > 1 else 0.0)
            self.meters.restarts.inc()
            try:
                await self._start(number)
            except (*DEAD, ValueError) as error:
                failures += 1
                await self._end(number)
                why = error if isinstance(error, ValueError) else "it ended before it had loaded the reward"
                logger.warning("worker %d cannot start: %s", number, why)
        await self._give_up(number)

    async def _give_up(self, number: int) -> None:
        logger.warning("worker %d died %d times in a row and is given up", number, GIVE_UP_AFTER)
        if number in self._up:
            await self._end(number)
        others = [seat for seat in self._seats if seat is not asyncio.current_task()]
        if all(seat.done() for seat in others) and not self.lost.done():
            self.lost.set_result(f"no worker is left, each died {GIVE_UP_AFTER} times in a row")
            for job in self._queue.empty():
                job.finish(Refusal(503, self.lost.result()))

    # --- its work

    async def _work(self, process: Process) -> bool:
        """Batch after batch until the process ends; whether it finished any."""
        finished = False
        gone = asyncio.create_task(process.wait())
        try:
            while True:
                take = asyncio.create_task(self._queue.take())
                try:
                    await asyncio.wait({take, gone}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    if not take.done():
                        take.cancel()
                if gone.done():
                    if take.done() and not take.cancelled():
                        await self._queue.give_back(take.result())
                    return finished
                outcome = await self._ask(process, take.result())
                finished = finished or outcome != "died"
                if outcome in ("died", "left_behind"):
                    return finished
        finally:
            gone.cancel()

    async def _ask(self, process: Process, batch: list[Job]) -> str:
        """One call and what becomes of it: scored, raised, timed_out, left_behind (timed out for good) or died."""
        started, pictures = time.monotonic(), sum(len(job.images) for job in batch)
        body = await asyncio.to_thread(self._packed, batch)
        self.meters.batch.observe(pictures)
        try:
            async with asyncio.timeout(self.config.timeout_s + GRACE_S):
                answer = await self._exchange(process, body)
        except TimeoutError:
            kill(process.pid)
            late = {"timed_out": True, "left_behind": True}
            answer: dict[str, Any] = {"error": f"no answer within {self.config.timeout_s:g} s", **late}
        except DEAD:
            answer = {"died": True}
        outcome = next(kind for kind in ("columns", "left_behind", "timed_out", "died", "error") if kind in answer)
        outcome = {"columns": "scored", "error": "raised"}.get(outcome, outcome)
        self.meters.call_seconds.observe(time.monotonic() - started)
        self.meters.calls.labels({"left_behind": "timed_out"}.get(outcome, outcome)).inc()
        if outcome == "scored":
            self.meters.pictures.inc(pictures)
            self._hand_out(batch, answer["columns"])
        elif len(batch) > 1:  # the good ones must not suffer for the bad one
            await self._again(batch)
        elif outcome == "died":
            await self._survived(batch[0])
        else:
            batch[0].finish(Refusal(504 if "timed_out" in answer else 500, f"the reward failed: {answer['error']}"))
        return outcome

    async def _exchange(self, process: Process, body: bytes) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        await frames.send(process.stdin, body)
        return await frames.receive(process.stdout)

    def _packed(self, batch: list[Job]) -> bytes:
        images = torch.cat([job.images for job in batch])
        prompts = [prompt for job in batch for prompt in job.prompts]
        lacking = self.config.batch_size - len(images) if self.config.fill and not self.groupwise else 0
        if lacking > 0:
            images = torch.cat([images, images[-1:].expand(lacking, *images.shape[1:])])
            prompts += [prompts[-1]] * lacking
        return wire.as_safetensors(images, prompts)

    def _hand_out(self, batch: list[Job], columns: Columns) -> None:
        start = 0
        for job in batch:
            end = start + len(job.images)
            job.finish({name: numbers[start:end] for name, numbers in columns.items()})
            start = end

    async def _survived(self, job: Job) -> None:
        """It was alone in a call in which the worker died."""
        job.deaths += 1
        if job.deaths < POISON:
            return await self._again([job])
        job.finish(
            Refusal(500, f"the reward failed: this request ended {POISON} worker processes, one after the other")
        )

    async def _again(self, batch: list[Job]) -> None:
        """One by one."""
        for job in batch:
            job.alone = True
        await self._queue.give_back(batch)
