"""Where the time of a step goes: pure functions from spans to seconds and shares.

A window is a stretch of time, begin and end in seconds since the epoch; a span counts as far as it lies inside. Clocks
of machines differ by milliseconds, so shares of very short steps are rough.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from types import MappingProxyType

from rlalign.runtime.pool import DRIVER, WAIT, Pool
from rlalign.types import Span

Window = tuple[float, float]

ROLES = (DRIVER, "sampler", "scorer", "learner")
PHASES = ("rollout", "reward", "update", "publish")
KINDS = {
    "sample": "rollout",
    "show": "evaluation",
    "score": "reward",
    "update": "update",
    "publish": "publish",
    "receive": "publish",
    "step": "step",
    "evaluation": "evaluation",
    "commit": "checkpoint",
    "save": "checkpoint",
    "load": "checkpoint",
}
UP = "runtime/workers/"
WAITING = "waiting"
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Readings:
    """What the pools tell since they were last asked."""

    spans: Sequence[Span]
    counts: Mapping[str, float]  # rewards' seconds and failures, and the runtime's counters, by their names in rows

    @staticmethod
    def of(pools: Iterable[Pool], stats: Mapping[str, float] = MappingProxyType({})) -> "Readings":
        """Asks them; ``stats`` is what the rewards counted."""
        counts: Counter[str] = Counter(stats)  # pyright: ignore[reportArgumentType]  # typeshed counts whole things only
        spans: list[Span] = []
        for pool in pools:
            counts.update(pool.counters())  # pyright: ignore[reportArgumentType]
            spans += pool.spans()
        return Readings(spans, counts)


@dataclass(frozen=True, slots=True)
class Split:
    """What one worker did with its time, as shares of it."""

    role: str
    worker: str
    phases: Mapping[str, float]  # rollout, reward, update, publish
    busy: float  # with whatever else it did

    @property
    def other(self) -> float:
        return max(0.0, self.busy - sum(self.phases.values()))

    @property
    def idle(self) -> float:
        return 1 - self.busy


def kind(span: Span) -> str:
    """What a call was for, as the pictures colour it; sampling and scoring without a step is evaluation."""
    if span.method.startswith(WAIT):
        return WAITING
    if span.method in ("sample", "score") and span.step is None:
        return "evaluation"
    return KINDS.get(span.method, OTHER)


def role(worker: str) -> str:
    """sampler-0 is a sampler."""
    return worker.rpartition("-")[0] or worker


def covered(spans: Iterable[Span], window: Window) -> float:
    """Seconds of the window in which at least one of the spans was going on."""
    begin, end = window
    total, reached = 0.0, begin
    for span in sorted(spans, key=lambda span: span.start):
        start, stop = max(span.start, reached), min(span.end, end)
        if stop > start:
            total, reached = total + stop - start, stop
    return total


def waits(spans: Iterable[Span]) -> list[Span]:
    """The driver's."""
    return [span for span in spans if span.worker == DRIVER and kind(span) == WAITING]


def own_work(pauses: Iterable[Span], window: Window) -> list[Window]:
    """When the driver itself was at work: the gaps between its waits."""
    gaps: list[Window] = []
    reached = window[0]
    for wait in sorted(pauses, key=lambda span: span.start):
        if min(wait.start, window[1]) > reached:
            gaps.append((reached, min(wait.start, window[1])))
        reached = max(reached, wait.end)
    return [*gaps, (reached, window[1])] if reached < window[1] else gaps


def splits(spans: Iterable[Span], windows: Sequence[Window]) -> list[Split]:
    """Of every worker and the driver, over the windows together; roles in the order of a step."""
    by_worker: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_worker[span.worker].append(span)
    total = sum(end - begin for begin, end in windows)
    found: list[Split] = []
    for worker in sorted(by_worker, key=in_order) if total > 0 else ():
        own = by_worker[worker]
        if worker == DRIVER:
            gaps = [gap for window in windows for gap in own_work(waits(own), window)]
            found.append(Split(DRIVER, DRIVER, {}, sum(end - begin for begin, end in gaps) / total))
            continue
        shares = {phase: sum(covered((s for s in own if kind(s) == phase), w) for w in windows) for phase in PHASES}
        busy = sum(covered(own, window) for window in windows)
        found.append(Split(role(worker), worker, {p: seconds / total for p, seconds in shares.items()}, busy / total))
    return found


def by_role(found: Iterable[Split]) -> dict[str, list[Split]]:
    roles: dict[str, list[Split]] = defaultdict(list)
    for one in found:
        roles[one.role].append(one)
    return dict(roles)


def step_times(readings: Readings, window: Window) -> dict[str, float]:
    """The ``time/`` and ``runtime/busy/`` numbers of one step, from the spans that ended in it.

    Seconds of phases are sums over workers and count a span whole; shares and idle seconds count what lies in the
    window, also of workers that are counted as up and did nothing.
    """
    spans, length = readings.spans, window[1] - window[0]
    up = {name.removeprefix(UP): int(count) for name, count in readings.counts.items() if name.startswith(UP)}
    seconds = {f"time/{phase}_s": sum(s.end - s.start for s in spans if kind(s) == phase) for phase in PHASES}
    seen = by_role(splits(spans, [window]))
    for name in sorted({*seen, *up} - {DRIVER}):
        found = [one.busy for one in seen.get(name, [])]
        found += [0.0] * (up.get(name, 0) - len(found))
        if not found:
            continue
        seconds |= {f"time/idle/{name}_s": (1 - fmean(found)) * length, f"runtime/busy/{name}": fmean(found)}
        if len(found) > 1:
            seconds |= {f"runtime/busy/{name}/min": min(found), f"runtime/busy/{name}/max": max(found)}
    seconds["time/driver_s"] = length - covered(waits(spans), window)
    return seconds


def step_windows(spans: Iterable[Span], last: int | None = None) -> list[Window]:
    """When the steps were, from the driver's own spans, in order of time; only the ``last`` so many."""
    windows = sorted((span.start, span.end) for span in spans if span.worker == DRIVER and span.method == "step")
    return windows if last is None else windows[-last:]


def within(spans: Iterable[Span], windows: Sequence[Window]) -> list[Span]:
    """The spans that reach between the first window's begin and the last one's end."""
    if not windows:
        return []
    return [span for span in spans if span.end > windows[0][0] and span.start < windows[-1][1]]


def in_order(worker: str) -> tuple[int, str, int]:
    """Roles as in a step, and sampler-10 after sampler-9."""
    name, _, number = worker.rpartition("-")
    place = ROLES.index(role(worker)) if role(worker) in ROLES else len(ROLES)
    return (place, name, int(number)) if number.isdigit() else (place, worker, 0)
