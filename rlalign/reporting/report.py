"""report.html: one file that shows what a run did, to be opened anywhere, with no network and no server."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import yaml
from PIL import Image

from rlalign.files import in_words, write_atomically
from rlalign.reporting import summary
from rlalign.reporting.advice import advice
from rlalign.reporting.alarms import read_alarms
from rlalign.reporting.charts import Chart, charts
from rlalign.reporting.glossary import explain
from rlalign.reporting.grids import label, saved
from rlalign.reporting.metrics import Row, read
from rlalign.reporting.spans import read_spans
from rlalign.reporting.timeline import timeline
from rlalign.reporting.timing import PHASES, Split, by_role, splits, step_windows, within
from rlalign.rundir import RunDir
from rlalign.types import Span

MOST_GRIDS = 10
TIMED_STEPS = 20
PARTS = (*PHASES, "other", "idle")
LARGE = 1_500_000
"""Bytes above which a grid is embedded as a JPEG."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of the last steps went."""

    steps: int
    advice: str | None
    picture: Chart | None
    roles: list["TimeRow"]
    workers: list["TimeRow"]


@dataclass(frozen=True, slots=True)
class TimeRow:
    """Shares of a role's or a worker's time, in words; ``parts`` are those of ``PARTS``."""

    name: str
    count: int
    busy: str
    parts: list[str]


@dataclass(frozen=True, slots=True)
class Grid:
    label: str
    image: str


def write_report(run_dir: Path, more: Mapping[str, str] | None = None) -> Path:
    """Writes RUN/report.html, also of a run that is still going on; ``more`` explains an algorithm's own metrics.

    ValueError when there is no run or what it wrote is damaged.
    """
    run, more = RunDir(run_dir), more or {}
    info, config = run.read_info(), run.read_config()
    rows = read(run.metrics) if run.metrics.exists() else []
    held_out = summary.evaluations(rows)
    changed = summary.changes(held_out)
    page = _template().render(
        name=run_dir.resolve().name,
        info=info,
        cards=summary.cards(rows, held_out, config),
        alarms=read_alarms(run.alarms),
        charts=charts(rows, held_out, more),
        timing=_timing(read_spans(run.spans), config),
        grids=_grids(run.samples),
        rewards=[change for change in changed if not change.name.startswith("task/")],
        tasks=[change for change in changed if change.name.startswith("task/")],
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        metrics=_glossary(rows, more),
    )
    write_atomically(run.report, page.encode())
    return run.report


def _timing(spans: Sequence[Span], config: Mapping[str, Any]) -> Timing | None:
    windows = step_windows(spans, last=TIMED_STEPS)
    if not windows:
        return None
    roles = by_role(splits(within(spans, windows), windows))
    staleness = (config.get("runtime") or {}).get("max_staleness", 0)
    whole = [_time_row(name, found) for name, found in roles.items()]
    single = [_time_row(one.worker, [one]) for found in roles.values() for one in found]
    return Timing(len(windows), advice(roles, staleness), timeline(spans), whole, single)


def _time_row(name: str, found: Sequence[Split]) -> TimeRow:
    busy = [one.busy for one in found]
    spread = f" ({min(busy):.0%} to {max(busy):.0%})" if len(found) > 1 else ""
    parts = [fmean(one.phases.get(phase, 0.0) for one in found) for phase in PHASES]
    parts += [fmean(one.other for one in found), fmean(one.idle for one in found)]
    return TimeRow(name, len(found), f"{fmean(busy):.0%}{spread}", [f"{p:.0%}" if p >= 0.005 else "" for p in parts])


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rlalign.reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": summary.number, "signed": summary.signed}
    environment.globals["PARTS"] = PARTS
    return environment.get_template("report.html.jinja")


def _grids(folder: Path) -> list[Grid]:
    """The first, the last and some between, evenly spread."""
    paths = saved(folder)
    last = len(paths) - 1
    count = min(len(paths), MOST_GRIDS)
    chosen = [paths[round(i * last / max(1, count - 1))] for i in range(count)]
    return [Grid(label(path), _picture(path)) for path in chosen]


def _picture(path: Path) -> str:
    with in_words(f"read {path}"):
        data, kind = path.read_bytes(), "png"
        if len(data) > LARGE:
            buffer, kind = io.BytesIO(), "jpeg"
            with Image.open(path) as image:
                image.convert("RGB").save(buffer, "jpeg", quality=85)
            data = buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _glossary(rows: Sequence[Row], more: Mapping[str, str]) -> list[tuple[str, float | None, str]]:
    """Every metric of the run with its last value and what it means."""
    last = {name: value for row in rows for name, value in row.items() if name != "step" and value is not None}
    return [(name, last[name], explain(name, more) or "") for name in sorted(last)]
