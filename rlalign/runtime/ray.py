"""Pools of Ray actors. Work goes to whoever is free; a worker that dies or hangs is replaced, its work issued again.

Whatever happens to workers, the values are those of a calm run: a call is a function of its arguments and of the
weights that its worker holds, and `hold` makes those the ones that were there when the call was submitted.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from rlalign.runtime.calls import Call, Hold, Ledger, Ref, makers_of_lost, with_slots
from rlalign.runtime.config import RuntimeConfig
from rlalign.runtime.engine import PING_EVERY_S, Engine, Event, end, make_again, want
from rlalign.runtime.host import Failure, Report, Setup
from rlalign.runtime.placement import Placement
from rlalign.runtime.pool import DRIVER, WAIT, LearnersLost, WorkerFailure
from rlalign.runtime.queue import Queue
from rlalign.runtime.spares import Spares
from rlalign.runtime.vacancy import Vacancy
from rlalign.runtime.worker import DEAD, Object, Running, Worker, in_words, raised, spent, value_or_error
from rlalign.types import Span
from rlalign.workers.group import exchange_failed

logger = logging.getLogger(__name__)

POISON = 3  # fresh workers that one call may kill
MAX_LOSSES = 10  # times that a call's arguments may be lost
ASK_AGAIN_S = 1.0  # for machines that are not there yet
NEWS_S = 10.0  # until the death of a rank is known, if it is why another one failed
LONG_WAIT_S = 1e-3  # shorter ones are not worth a span

WEIGHTS_LOST = "the published weights went with the machine of the learners"

Start = Callable[["list[Worker]"], "list[tuple[Any, ...]]"]
"""What the setups of these new processes are given besides their `Setup`."""


class RayPool:
    """See `Pool`. ``together``: the workers are one group, in which all die when one does."""

    def __init__(
        self,
        engine: Engine,
        placement: Placement,
        config: RuntimeConfig,
        role: str,
        setups: Sequence[Setup],
        together: Start | None = None,
        spares: Spares | None = None,
        seed: int = 0,
    ) -> None:
        self.engine, self.placement, self.config, self.role, self.seed = engine, placement, config, role, seed
        self.setups, self.together, self.spares = setups, together, spares
        self.size = len(setups)
        self.workers = [Worker(setup.name, index) for index, setup in enumerate(setups)]
        self.vacancy = Vacancy(role, placement.complaint)
        self.queue = Queue(
            lambda hold, worker: self._new(hold.method, hold.args, 1, worker, sets=hold), idle=not config.offload_idle
        )
        self.ledger = Ledger()
        self.ended: list[Span] = []
        self.restarts = self.reissued = 0
        self.begun = False  # all that had a machine at the beginning are up
        self.logs: Path | None = None
        engine.members.append(self)
        self.feed()

    # --- the verbs

    def submit(self, method: str, *args: Any, returns: int = 1) -> Any:
        refs = self._call(method, args, returns)
        return refs[0] if returns == 1 else tuple(refs)

    def scatter(self, method: str, items: Sequence[tuple[Any, ...]]) -> list[Ref]:
        return [self._call(method, args, 1, worker)[0] for worker, args in enumerate(items)]

    def broadcast(self, method: str, *args: Any, returns: int = 1) -> list[Any]:
        """A worker that is given up before it answers gives None."""
        refs = [self._call(method, args, returns, worker.index) for worker in self.workers if not worker.retired]
        return [one[0] if returns == 1 else tuple(one) for one in refs]

    def hold(self, method: str, *args: Any) -> list[Ref]:
        """A worker that dies before it answers gives None; whoever is not up makes the call when it is."""
        told = [worker.index for worker in self.workers if worker.up]
        return [ref for call in self.queue.hold(Hold(method, args), told) for ref in call.new_refs()]

    def get(self, refs: Sequence[Ref]) -> list[Any]:
        for ref in refs:
            want(ref.call)
        self.engine.wait(lambda: all(ref.call.done for ref in refs) or self._broken(refs), self._waited)
        if self._broken(refs):
            raise self._why_broken(next(ref.call.failure for ref in refs if ref.call.failure))
        return [self._value(ref) for ref in refs]

    def spans(self) -> list[Span]:
        ended, self.ended = self.ended, []
        return ended

    def counters(self) -> dict[str, float]:
        return {
            f"runtime/workers/{self.role}": float(sum(worker.up for worker in self.workers)),
            f"runtime/restarts/{self.role}": float(self.restarts),
            "runtime/reissued": float(self.reissued),
            "runtime/bytes_in_flight": float(self.ledger.bytes_in_flight),
        }

    def members(self) -> list[dict[str, Any]]:
        return [{"role": self.role, "index": worker.index, **worker.state()} for worker in self.workers]

    def aside(self, method: str, *args: Any) -> list[Object]:
        """The call on every worker that is up, beside its other work: at once, and only once."""
        return [worker.actor.aside.remote(method, *args) for worker in self.workers if worker.up]

    def wait_aside(self, refs: Sequence[Object], timeout_s: float) -> list[Any]:
        """Values of `aside`, or the exceptions in their place."""
        started = time.time()
        ray.wait([*refs], num_returns=len(refs), timeout=timeout_s)
        self._waited(started, time.time())
        return [value_or_error(ref) for ref in refs]

    def log_to(self, folder: Path) -> None:
        self.logs = folder
        for worker in self.workers:
            if worker.actor is not None:
                worker.actor.log_to.remote(folder, worker.name)

    def close(self) -> None:
        if self in self.engine.members:
            self.engine.members.remove(self)
        self._end_all()

    def restart(self) -> None:
        """New processes for a group that was lost; what was asked of the old ones is forgotten."""
        self.forget()
        self._end_all()
        for worker in self.workers:
            self._vacate(worker)
            self.placement.renew(self.role, worker.index)
        self.restarts += 1
        self.feed()

    def forget(self) -> None:
        """Nobody waits any more for what was submitted. Workers finish what they are at."""
        self.queue.forget()
        for worker in self.workers:
            for running in worker.running:
                running.call.dropped = True

    @property
    def settled(self) -> bool:
        """Nobody is on the way up, but for those without a machine."""
        return all(worker.up or worker.actor is None for worker in self.workers)

    # --- calls

    def _call(self, method: str, args: tuple[Any, ...], returns: int, worker: int | None = None) -> list[Ref]:
        refs = (call := self._new(method, args, returns, worker)).new_refs()
        call.wait_for(ref.call for ref in call.inputs())
        return refs

    def _new(
        self, method: str, args: tuple[Any, ...], returns: int, worker: int | None, sets: Hold | None = None
    ) -> Call:
        order = self.engine.next_order()
        return Call(method, args, returns, order, self.ledger, self.queue.put, worker, self.queue.holding, sets)

    def _value(self, ref: Ref) -> Any:
        while True:
            if ref.call.failure is not None:
                raise raised(ref.call.failure)
            if ref.object is None:
                return ref.value
            try:
                return ray.get(ref.object)
            except ObjectLostError as error:
                self._lost(ref.call, [ref], error)
                self.engine.wait(lambda: ref.call.done, self._waited)

    def _broken(self, refs: Sequence[Ref]) -> bool:
        """Whether a rank failed: the others may wait for it, in an exchange, for half an hour."""
        return self.together is not None and any(ref.call.failure for ref in refs)

    def _why_broken(self, failure: Failure) -> BaseException:
        """Raises `LearnersLost` where it came of the death of another rank."""
        end = time.monotonic() + NEWS_S
        self.engine.wait(
            lambda: time.monotonic() > end or not any(worker.running for worker in self.workers), self._waited
        )
        if exchange_failed(failure.error):
            return LearnersLost(f"the learners lost each other: {in_words(failure.error)}")
        return raised(failure)

    def _waited(self, start: float, end: float) -> None:
        if end - start > LONG_WAIT_S:
            self.ended.append(Span(DRIVER, f"{WAIT}{self.role}", start, end))

    # --- what the engine asks

    def events(self) -> Iterator[tuple[Object, Event]]:
        for worker in self.workers:
            if worker.starting is not None:
                yield worker.starting, lambda found, worker=worker: self._started(worker, found)
            elif worker.running:
                yield worker.running[0].report, lambda found, worker=worker: self._ended(worker, found)
            if worker.ping is not None:
                yield worker.ping, lambda found, worker=worker: self._ponged(worker, found)

    def feed(self) -> None:
        vacant = [worker for worker in self.workers if self._can_start(worker)]
        if vacant and (self.together is None or len(vacant) == self.size):
            self._start(vacant)
        up = [worker for worker in self.workers if worker.up]
        # A second one hides the driver's latency; near the end, a slow worker would keep it from those that are free.
        for depth in (1, 2) if len(self.queue.ready) > 2 * len(up) else (1,):
            for worker in up:
                while len(worker.running) < depth and (call := self.queue.next(worker, self.engine.full)) is not None:
                    self._send(worker, call)

    def watch(self) -> None:
        now, limits = time.monotonic(), self.config
        if self.spares is not None and self.settled:
            self.spares.keep(worker.where.node_id for worker in self.workers if worker.where)
        for worker in self.workers:
            if worker.up and worker.ping is None and now - worker.pinged > PING_EVERY_S:
                worker.ping, worker.pinged = worker.actor.ping.remote(), now
            elif worker.ping is not None and now - worker.pinged > limits.ping_timeout_s:
                self._died(worker, f"it did not answer for {limits.ping_timeout_s:g} s")
            elif self._may_be_late(worker) and now - worker.since > limits.call_timeout_s:
                self._died(worker, f"it took more than {limits.call_timeout_s:g} s for {worker.deed}")
        self.vacancy.watch(all(worker.actor is None for worker in self.workers), limits.machine_timeout_s)

    def _may_be_late(self, worker: Worker) -> bool:
        """An update takes as long as it takes."""
        return worker.starting is not None or (self.together is None and bool(worker.running))

    # --- life of a worker

    def _can_start(self, worker: Worker) -> bool:
        now = time.monotonic()
        if worker.actor is not None or worker.retired or now < worker.resume_at:
            return False
        ready = self.placement.ready(self.role, worker.index)
        worker.resume_at = 0.0 if ready else now + ASK_AGAIN_S
        return ready

    def _start(self, workers: list[Worker]) -> None:
        for worker in workers:
            spare = None
            if self.spares is not None and worker.births:
                spare = self.spares.take(self.placement.machine(self.role, worker.index))
            worker.begin(self.placement.options(self.role, worker.index), spare)
        more = self.together(workers) if self.together is not None else [() for _ in workers]
        for worker, args in zip(workers, more, strict=True):
            worker.starting = worker.actor.setup.remote(self.setups[worker.index], *args)
            if self.logs is not None:
                worker.actor.log_to.remote(self.logs, worker.name)

    def _started(self, worker: Worker, found: Object) -> None:
        if worker.starting is not found:
            return  # it died of something else in the meantime
        try:
            where, failure = ray.get(found)
        except RayError as error:  # also of what it was to be told by another one, the group's address
            return self._died(worker, in_words(error))
        if failure is not None and worker.births == 1 and not self.begun:
            raise raised(failure)
        if failure is not None:  # others could start, so the next one may
            return self._died(worker, in_words(failure.error))
        worker.starting, worker.untried, worker.where, worker.pinged = None, False, where, time.monotonic()
        if worker.births > 1:
            logger.warning("%s is back, as process %d on %s", worker.name, where.pid, where.node)
        self.engine.changed()

    def _ended(self, worker: Worker, found: Object) -> None:
        if not worker.running or worker.running[0].report is not found:
            return
        running = worker.running[0]
        try:
            report: Report = ray.get(found)
        except DEAD as error:
            return self._died(worker, in_words(error))
        except (RayTaskError, ObjectLostError) as error:  # before the call began: an argument could not be had
            if isinstance(getattr(error, "cause", None), MemoryError):
                return self._died(worker, in_words(error))
            worker.running.popleft()
            worker.since = time.monotonic()
            return self._lost(running.call, [*running.call.inputs()], error)
        if self.together is None and report.failure is not None and spent(report.failure.error):
            return self._died(worker, in_words(report.failure.error))
        worker.running.popleft()
        worker.since = time.monotonic()
        if report.span is not None:
            self.ended.append(report.span)
        self._took(worker, running, report)

    def _took(self, worker: Worker, running: Running, report: Report) -> None:
        call = running.call
        if call.sets is None:
            worker.finished, worker.deaths = True, 0
        elif report.failure is not None and not call.dropped:
            lost = isinstance(report.failure.error, ObjectLostError)
            raise LearnersLost(WEIGHTS_LOST) if lost else raised(report.failure)
        if call.dropped:
            return
        if report.failure is None:
            assert worker.where is not None
            call.keep(report, running.values, worker.where.node_id)
        call.finish(report.failure)

    def _ponged(self, worker: Worker, found: Object) -> None:
        if worker.ping is not found:
            return
        try:
            ray.get(found)
            worker.ping, worker.pinged = None, time.monotonic()
        except RayError as error:
            self._died(worker, in_words(error))

    def _died(self, worker: Worker, reason: str) -> None:
        end(worker.actor)
        if self.together is not None:
            raise LearnersLost(f"{worker.described} died: {reason}")
        self.restarts += 1
        worker.deaths += not worker.untried
        what, fresh = worker.described, not worker.finished
        running = [one.call for one in worker.running if not one.call.dropped]
        self._vacate(worker)
        again = self._issue_again(running, fresh, what, reason)
        if worker.deaths > self.config.restarts:
            self._retire(worker, reason)
        else:
            worker.resume_at = time.monotonic() + worker.pause
            logger.warning("%s died: %s; it is replaced, calls issued again: %d", what, reason, again)
            self.placement.renew(self.role, worker.index)
        self.engine.changed()

    def _end_all(self) -> None:
        for worker in self.workers:
            if worker.actor is not None:
                end(worker.actor)

    def _vacate(self, worker: Worker) -> None:
        worker.vacate()
        self.queue.skip_acknowledgements(worker.index)

    def _issue_again(self, calls: list[Call], fresh: bool, what: str, reason: str) -> int:
        """How many were; WorkerFailure for one that kills whoever makes it."""
        before = self.reissued
        for number, call in enumerate(calls):
            if call.sets is not None:  # an acknowledgement: the next process makes the call of itself
                call.finish()
                continue
            self.reissued += 1
            call.deaths += number == 0 and fresh
            if call.deaths >= POISON:
                whom = f"{POISON} fresh {self.role}s, the last of them {what}"
                raise WorkerFailure(f"{call.describe()}, seed {self.seed}, killed {whom}: {reason}")
            self.queue.put(call)
        return self.reissued - before

    def _retire(self, worker: Worker, reason: str) -> None:
        worker.retired = True
        logger.warning("%s died %d times in a row and is given up: %s", worker.name, worker.deaths, reason)
        for call in self.queue.pinned.pop(worker.index, []):
            call.finish()
        if all(other.retired for other in self.workers):
            raise WorkerFailure(f"no {self.role} is left, each died {worker.deaths} times in a row: {reason}")

    # --- handing out work

    def _send(self, worker: Worker, call: Call) -> None:
        failed = next((ref.call.failure for ref in call.inputs() if ref.call.failure is not None), None)
        if failed is not None:
            worker.holding = call.sets or worker.holding  # else it would be asked again and again
            return call.finish(failed)
        objects: list[Any] = []
        args = with_slots(call.args, objects)
        method = worker.actor.call.options(num_returns=1 + call.returns)
        report, *values = method.remote(call.method, args, call.returns, *objects)
        if not worker.running:
            worker.since = time.monotonic()
        worker.running.append(Running(call, report, values))
        worker.holding = call.sets or worker.holding  # calls of a worker keep their order

    def _lost(self, call: Call, refs: Sequence[Ref], error: Exception) -> None:
        """Values that it needs went with their node: they are made again, and then it is."""
        if call.dropped:
            return
        if call.sets is not None:
            raise LearnersLost(WEIGHTS_LOST) from error
        call.losses += 1
        if call.losses > MAX_LOSSES or not isinstance(getattr(error, "cause", error), RayError):
            raise error
        gone = makers_of_lost(refs)
        logger.warning("%d results were lost with their node and are made again", len(gone))
        self.reissued += make_again(gone, call)
