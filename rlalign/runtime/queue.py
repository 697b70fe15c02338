"""Calls that wait for the workers of a pool, and what a worker must hold before it may make one."""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable

from rlalign.runtime.calls import Call, Hold, refs_in
from rlalign.runtime.worker import Worker


class Queue:
    """``new(hold, worker)``: a call by which this worker comes to hold that.

    ``idle``: whether a worker that nobody waits for comes to hold it, too. Not where others may have its GPU.
    """

    def __init__(self, new: Callable[[Hold, int], Call], idle: bool = True) -> None:
        self.new, self.idle = new, idle
        self.ready: list[Call] = []  # a heap: calls for any worker
        self.pinned: dict[int, list[Call]] = defaultdict(list)  # heaps: calls for one worker alone
        self.holding: Hold | None = None
        self.acknowledgements: dict[tuple[int, int], Call] = {}  # of a hold, by a worker

    def put(self, call: Call) -> None:
        heapq.heappush(self._of(call), call)

    def hold(self, hold: Hold, workers: list[int]) -> list[Call]:
        """From now on every worker must hold this. The calls by which these workers, which can be told, come to do."""
        self.holding = hold
        calls = {worker: self.new(hold, worker) for worker in workers}
        self.acknowledgements |= {(id(hold), worker): call for worker, call in calls.items()}
        return [*calls.values()]

    def next(self, worker: Worker, full: bool) -> Call | None:
        """The oldest call that this worker can make; before it, what the worker must hold for that.

        ``full``: only one that the driver waits for, however many older ones it does not wait for.
        """
        call = self._oldest_wanted(worker) if full else self._oldest(worker)
        needed = self._of_idle(worker) if call is None else call.hold
        if needed is not None and needed is not worker.holding:
            return self._to_hold(worker, needed)
        if call is not None:
            self._take(call)
        return call

    def skip_acknowledgements(self, worker: int, before: float = math.inf) -> None:
        """Those that it will not give any more are None: it died, or went on to something newer."""
        for key, call in [*self.acknowledgements.items()]:
            if key[1] == worker and call.order < before:
                self.acknowledgements.pop(key).finish()

    def forget(self) -> None:
        self.ready.clear()
        self.pinned.clear()
        self.acknowledgements.clear()
        self.holding = None

    def _of(self, call: Call) -> list[Call]:
        return self.ready if call.worker is None else self.pinned[call.worker]

    def _of_idle(self, worker: Worker) -> Hold | None:
        return self.holding if self.idle or (id(self.holding), worker.index) in self.acknowledgements else None

    def _oldest(self, worker: Worker) -> Call | None:
        return min((queue[0] for queue in (self.ready, self.pinned[worker.index]) if queue), default=None)

    def _oldest_wanted(self, worker: Worker) -> Call | None:
        queues = self.ready, self.pinned[worker.index]
        return min((call for queue in queues for call in queue if call.wanted), default=None)

    def _take(self, call: Call) -> None:
        queue = self._of(call)
        if queue[0] is call:
            heapq.heappop(queue)
        else:
            queue.remove(call)
            heapq.heapify(queue)

    def _to_hold(self, worker: Worker, hold: Hold) -> Call | None:
        if not all(ref.call.done for ref in refs_in(hold.args)):
            return None
        known = self.acknowledgements.pop((id(hold), worker.index), None)
        if known is None:
            return self.new(hold, worker.index)
        self.skip_acknowledgements(worker.index, known.order)
        return known
