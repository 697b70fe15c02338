"""What a run came to, read off its rows: evaluations by step, before and after, the headline numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlalign.reporting.metrics import FINAL, Row, column

Series = dict[int, float]
LEAST_DIVERSITY = 0.8


@dataclass(frozen=True, slots=True)
class Change:
    """A held-out number of the base and of the newest weights that were evaluated."""

    name: str
    before: float
    after: float | None

    @property
    def difference(self) -> float | None:
        return None if self.after is None else self.after - self.before

    @property
    def is_share(self) -> bool:
        """Can be drawn as a bar from 0 to 1."""
        return all(0 <= value <= 1 for value in (self.before, self.after) if value is not None)


@dataclass(frozen=True, slots=True)
class Card:
    """A headline number."""

    title: str
    value: str
    note: str = ""
    warning: bool = False


def evaluations(rows: Sequence[Row]) -> dict[str, Series]:
    """Every held-out metric (without eval/) by the number of updates its weights had."""
    names = dict.fromkeys(name.split("/", 1)[1] for row in rows for name in row if name.startswith(("eval/", FINAL)))
    series = {name: column(rows, f"eval/{name}") for name in names}
    for name, value in (rows[-1] if rows else {}).items():
        if name.startswith(FINAL) and value is not None:
            series[name.removeprefix(FINAL)][len(rows)] = value
    return {name: by_step for name, by_step in series.items() if by_step}


def changes(held_out: Mapping[str, Series]) -> list[Change]:
    """Before and after of every held-out metric."""
    return [
        Change(name, by_step[min(by_step)], by_step[max(by_step)] if len(by_step) > 1 else None)
        for name, by_step in held_out.items()
    ]


def cards(rows: Sequence[Row], held_out: Mapping[str, Series], config: Mapping[str, Any]) -> list[Card]:
    """The numbers to see first."""
    found = [
        _reward(rows, held_out),
        _diversity(rows, held_out),
        Card("Steps", f"{len(rows)} of {config.get('steps', '?')}", "updates of the weights"),
        _images(rows, config),
        Card("Time", duration(seconds(rows)), "training and evaluation"),
        _ratio(rows),
    ]
    return [card for card in found if card is not None]


def seconds(rows: Sequence[Row]) -> float:
    """Training and evaluation of all steps together."""
    return float(sum(row.get(name) or 0.0 for row in rows for name in ("time/step_s", "time/eval_s")))


def duration(total: float) -> str:
    """Two units at most: 2 h 05 min, 3 min 20 s, 12.5 s."""
    if total < 60:
        return f"{total:.1f} s"
    minutes, rest = divmod(round(total), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: float | None) -> str:
    """As many digits as a reader needs."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == round(value) or abs(value) >= 1000:
        words = f"{value:,.0f}"
    elif abs(value) >= 1e-3:
        words = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    else:
        words = f"{value:.1e}"
    return words.replace("-", "−")


def signed(value: float | None) -> str:
    return ("+" if value is not None and value > 0 else "") + number(value)


def _reward(rows: Sequence[Row], held_out: Mapping[str, Series]) -> Card | None:
    if "reward/mean" in held_out:
        (change,) = changes({"reward/mean": held_out["reward/mean"]})
        if change.after is None:
            return Card("Held-out reward", number(change.before), "of the base; not evaluated since")
        value = f"{number(change.before)} → {number(change.after)}"
        return Card("Held-out reward", value, f"{signed(change.difference)} on held-out prompts")
    trained = list(column(rows, "reward/mean").values())
    if not trained:
        return None
    return Card("Training reward", f"{number(trained[0])} → {number(trained[-1])}", "no held-out evaluation", True)


def _diversity(rows: Sequence[Row], held_out: Mapping[str, Series]) -> Card | None:
    series = held_out.get("diversity") or column(rows, "diversity")
    if not series:
        return None
    value = series[max(series)]
    narrow = value < LEAST_DIVERSITY
    note = f"below {LEAST_DIVERSITY}: the model narrows" if narrow else "distance between pictures of a prompt"
    return Card("Diversity", f"{value:.2f} × base", note, narrow)


def _images(rows: Sequence[Row], config: Mapping[str, Any]) -> Card | None:
    counted = column(rows, "images")
    if counted:
        return Card("Training images", f"{counted[max(counted)]:,.0f}", "generated and scored")
    rollout = config.get("rollout")
    if not isinstance(rollout, Mapping) or not {"prompts_per_step", "samples_per_prompt"} <= rollout.keys():
        return None
    total = len(rows) * rollout["prompts_per_step"] * rollout["samples_per_prompt"]
    return Card("Training images", f"{total:,}", "generated and scored")


def _ratio(rows: Sequence[Row]) -> Card | None:
    deviations = column(rows, "ratio/max_abs_dev")
    if not deviations:
        return None
    worst = max(deviations.values())
    note = "sampler and learner agree exactly" if worst == 0 else "at the first update of a step"
    return Card("Largest |ratio − 1|", number(worst), note)
