"""The last steps as a picture: a lane for the driver and each worker, coloured where it works, blank where it idles."""

from collections import defaultdict
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rlalign.reporting.charts import COLOURS, GREY, Chart, as_uri
from rlalign.reporting.timing import Window, in_order, kind, own_work, role, step_windows, waits, within
from rlalign.runtime.pool import DRIVER
from rlalign.types import Span

SHOWN = ("rollout", "reward", "update", "publish", "evaluation", "checkpoint", "loop", "other")
COLOUR: dict[str, str] = dict(zip(SHOWN, COLOURS, strict=False))
MOST_STEPS = 4
RECENT = 20
MOST_LANES = 12
"""Of one role; the others are in the trace."""
FINEST = 1 / 2000
"""Of the width: shorter gaps are not drawn."""

Bars = dict[str, list[Window]]


def timeline(spans: Sequence[Span]) -> Chart | None:
    """None where no step is known."""
    windows = neighbours(step_windows(spans))
    if not windows:
        return None
    view = (windows[0][0], windows[-1][1])
    lanes = bars(within(spans, windows), windows)
    shown, hidden = chosen(list(lanes))
    figure = Figure(figsize=(11.0, 0.9 + 0.3 * len(shown)), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    for place, worker in enumerate(shown):
        for name, stretches in lanes[worker].items():
            _draw(axes, place, merged(stretches, view), view[0], COLOUR[name])
    for begin, _ in windows:
        axes.axvline(begin - view[0], color=GREY, linewidth=0.8, linestyle=":")
    _decorate(axes, shown, view[1] - view[0])
    kinds = [name for name in COLOUR if any(name in lanes[worker] for worker in shown)]
    patches = [Patch(color=COLOUR[name], label=name) for name in kinds]
    figure.legend(handles=patches, loc="outside upper left", ncols=8, frameon=False, labelcolor=GREY, fontsize=9)
    more = f" Not shown: {', '.join(f'{n} more {name}s' for name, n in hidden.items())}." if hidden else ""
    begun = "One step" if len(windows) == 1 else f"{len(windows)} steps in a row, each from a dotted line on"
    words = f"{begun}; blank is idle.{more}"
    return Chart("Timeline", as_uri(figure), [("", words)])


def neighbours(windows: Sequence[Window], most: int = MOST_STEPS) -> list[Window]:
    """The last few steps that follow each other closely: an evaluation between them would press them together."""
    chains: list[list[Window]] = []
    for begin, end in windows[-RECENT:]:
        if chains and begin - chains[-1][-1][1] <= 0.5 * (end - begin):
            chains[-1].append((begin, end))
        else:
            chains.append([(begin, end)])
    newest_first = [chain[-most:] for chain in reversed(chains)]
    return max(newest_first, key=len, default=[])


def bars(spans: Sequence[Span], windows: Sequence[Window]) -> dict[str, Bars]:
    """What each lane shows, by kind, lanes in order; the driver works while it does not wait."""
    lanes: dict[str, Bars] = {worker: defaultdict(list) for worker in sorted({s.worker for s in spans}, key=in_order)}
    for span in spans:
        if span.worker != DRIVER:
            lanes[span.worker][kind(span)].append((span.start, span.end))
    if DRIVER in lanes:
        lanes[DRIVER]["loop"] = [gap for window in windows for gap in own_work(waits(spans), window)]
    return lanes


def chosen(workers: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """The lanes to show, and how many of each role are not."""
    seen: dict[str, int] = defaultdict(int)
    shown: list[str] = []
    for worker in workers:
        seen[role(worker)] += 1
        if seen[role(worker)] <= MOST_LANES:
            shown.append(worker)
    return shown, {name: count - MOST_LANES for name, count in seen.items() if count > MOST_LANES}


def merged(stretches: Sequence[Window], view: Window) -> list[Window]:
    """Cut to the view; stretches with hardly a gap between them become one."""
    least = FINEST * (view[1] - view[0])
    found: list[Window] = []
    for begin, end in sorted(stretches):
        begin, end = max(begin, view[0]), min(end, view[1])
        if end <= begin:
            continue
        if found and begin - found[-1][1] < least:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _draw(axes: Axes, place: int, stretches: Sequence[Window], zero: float, colour: str) -> None:
    lengths = [(begin - zero, end - begin) for begin, end in stretches]
    axes.broken_barh(lengths, (place - 0.36, 0.72), facecolors=colour, alpha=0.85, linewidth=0)


def _decorate(axes: Axes, workers: Sequence[str], seconds: float) -> None:
    axes.set_yticks(range(len(workers)), workers)
    axes.set_ylim(len(workers) - 0.5, -0.5)
    axes.set_xlim(0, seconds)
    axes.set_xlabel("seconds", color=GREY, fontsize=9)
    axes.tick_params(colors=GREY, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GREY)
