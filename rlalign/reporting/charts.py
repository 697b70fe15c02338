"""Curves for the report: SVG on a transparent ground, in colours that read on light and on dark."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlalign.files import in_words
from rlalign.reporting.glossary import explain
from rlalign.reporting.metrics import Row, column
from rlalign.reporting.summary import LEAST_DIVERSITY, Series

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#06b6d4", "#ec4899", "#84cc16", "#64748b")
GREY = "#80868f"
MOST_POINTS = 600
TIMES = ("rollout", "reward", "update", "publish", "eval", "checkpoint")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture as a data URI, and what it shows."""

    title: str
    image: str
    explanations: list[tuple[str, str]]


def charts(rows: Sequence[Row], held_out: Mapping[str, Series], more: Mapping[str, str]) -> list[Chart]:
    """Every chart that the run has numbers for."""
    rewards = {n: s for n, s in held_out.items() if n.startswith("reward/") and n != "reward/mean"}
    tasks = {n: s for n, s in held_out.items() if n.startswith("task/")}
    train = {f"reward/{n.split('/')[1]}/mean": column(rows, n) for n in _names(rows) if _is_part(n)}
    found = [
        _reward_chart(rows, held_out, more),
        _lines("Held-out rewards", {f"eval/{n}": s for n, s in rewards.items()}, more) if len(rewards) > 1 else None,
        _lines("Training rewards", train, more) if len(train) > 1 else None,
        _lines("Held-out accuracy by task", {f"eval/{n}": s for n, s in tasks.items()}, more),
        _diversity_chart(rows, held_out, more),
        *(
            _lines(title, {name: column(rows, name) for name in names}, more)
            for title, names in {
                "Drift from the base": ("kl",),
                "On-policy ratio": ("ratio/max_abs_dev",),
                "Clipped share": ("clip_fraction",),
                "Gradient norm": ("grad_norm",),
                "Staleness": ("staleness",),
            }.items()
        ),
        _time_chart(rows, more),
        _lines("Speed", {"images_per_s": column(rows, "images_per_s")}, more),
    ]
    return [chart for chart in found if chart is not None]


def _reward_chart(rows: Sequence[Row], held_out: Mapping[str, Series], more: Mapping[str, str]) -> Chart | None:
    names, figure = ("reward/mean", "eval/reward/mean"), _reward_figure(rows, held_out)
    return None if figure is None else Chart("Reward", as_uri(figure), _explanations(names, more))


def save_reward_chart(rows: Sequence[Row], held_out: Mapping[str, Series], file: Path) -> bool:
    """As a PNG on white; whether there was anything to draw."""
    figure = _reward_figure(rows, held_out)
    if figure is None:
        return False
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    with in_words(f"write {file}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(buffer.getvalue())
    return True


def _reward_figure(rows: Sequence[Row], held_out: Mapping[str, Series]) -> Figure | None:
    train, evaluated = column(rows, "reward/mean"), held_out.get("reward/mean", {})
    if not train and not evaluated:
        return None
    figure, axes = _axes()
    _draw(axes, _thinned(train), GREY, "training prompts", thin=True)
    _draw(axes, evaluated, COLOURS[0], "held-out prompts")
    legend(figure)
    return figure


def _diversity_chart(rows: Sequence[Row], held_out: Mapping[str, Series], more: Mapping[str, str]) -> Chart | None:
    train, evaluated = column(rows, "diversity"), held_out.get("diversity", {})
    if not train and not evaluated:
        return None
    figure, axes = _axes()
    axes.axhline(LEAST_DIVERSITY, color=COLOURS[4], linewidth=1, linestyle="--", label=f"alarm below {LEAST_DIVERSITY}")
    _draw(axes, _thinned(train), GREY, "training prompts", thin=True)
    _draw(axes, evaluated, COLOURS[0], "held-out prompts")
    legend(figure)
    return Chart("Diversity, base = 1", as_uri(figure), _explanations(("diversity", "eval/diversity"), more))


def _time_chart(rows: Sequence[Row], more: Mapping[str, str]) -> Chart | None:
    names = [name for part in TIMES if any(column(rows, name := f"time/{part}_s").values())]
    if not names:
        return None
    figure, axes = _axes()
    kept = _thinned({row["step"]: row for row in rows})
    stack = [[row.get(name) or 0.0 for row in kept.values()] for name in names]
    labels = [name.removeprefix("time/").removesuffix("_s") for name in names]
    axes.stackplot(list(kept), stack, labels=labels, colors=COLOURS[: len(names)], alpha=0.8, linewidth=0)
    legend(figure)
    return Chart("Seconds a step", as_uri(figure), _explanations(names, more))


def _lines(title: str, series: Mapping[str, Mapping[int, float]], more: Mapping[str, str]) -> Chart | None:
    """One line a metric; None when there is nothing to draw."""
    present = {name: by_step for name, by_step in series.items() if by_step}
    if not present:
        return None
    figure, axes = _axes()
    for index, (name, by_step) in enumerate(present.items()):
        _draw(axes, _thinned(by_step), COLOURS[index % len(COLOURS)], _label(name))
    if len(present) > 1:
        legend(figure)
    return Chart(title, as_uri(figure), _explanations(list(present), more))


def _draw(axes: Axes, series: Mapping[int, float], colour: str, label: str, thin: bool = False) -> None:
    if not series:
        return
    marker = "o" if len(series) <= 30 else ""
    width, size = (1.2, 2.0) if thin else (2.0, 4.0)
    axes.plot(list(series), list(series.values()), color=colour, label=label, linewidth=width, marker=marker, ms=size)


def legend(figure: Figure) -> None:
    """Above the curves, never over them."""
    figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=GREY, fontsize=9)


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.0), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.tick_params(colors=GREY, labelsize=9)
    axes.set_xlabel("updates", color=GREY, fontsize=9)
    axes.grid(color=GREY, alpha=0.2)
    axes.margins(x=0.02)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    return figure, axes


def as_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "rlalign"}):  # the same numbers give the same bytes
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _thinned(by_step: Mapping[int, T]) -> dict[int, T]:
    """At most ``MOST_POINTS`` points, evenly spread, the last one always."""
    items = list(by_step.items())
    stride = -(-len(items) // MOST_POINTS)
    return dict(items if stride <= 1 else [*items[::stride], items[-1]])


def _explanations(names: Sequence[str], more: Mapping[str, str]) -> list[tuple[str, str]]:
    """Each sentence once, so that ten tasks do not say the same ten times."""
    by_sentence: dict[str, list[str]] = {}
    for name in names:
        by_sentence.setdefault(explain(name, more) or "", []).append(name)
    return [(", ".join(group), sentence) for sentence, group in by_sentence.items()]


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _is_part(name: str) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and parts[0] == "reward" and parts[2] == "mean"


def _label(name: str) -> str:
    for prefix in ("eval/task/", "eval/reward/", "reward/"):
        if name.startswith(prefix):
            return name.removeprefix(prefix).removesuffix("/mean")
    return name
