"""Rows as Prometheus metrics, through Ray: every node of a cluster exports what ``ray.util.metrics`` was told.

The names and meanings stand in ``EXPORTED`` alone; ``cluster/grafana/rlalign.json`` draws them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Exported:
    """A metric of Prometheus and where its values stand in a row; <label> in there becomes its label."""

    kind: Literal["gauge", "sum", "total"]
    """gauge: the row's value; sum: a counter that grows by it; total: a counter that follows it."""
    row: str
    meaning: str

    @property
    def label(self) -> str | None:
        found = re.search(r"<(\w+)>", self.row)
        return found and found[1]

    def matches(self, name: str) -> tuple[str, ...] | None:
        """The label's value, if there is a label; None when the row's number is another one."""
        pattern = re.sub(r"<\\?\w+>", "([^/]+)", re.escape(self.row).replace(r"\<", "<").replace(r"\>", ">"))
        found = re.fullmatch(pattern, name)
        return found and found.groups()


EXPORTED: dict[str, Exported] = {
    "rlalign_reward_mean": Exported("gauge", "reward/mean", "Weighted sum of the training rewards, mean of a step."),
    "rlalign_reward": Exported("gauge", "reward/<reward>/mean", "One reward alone, mean of a step."),
    "rlalign_eval_reward_mean": Exported("gauge", "eval/reward/mean", "The same on held-out prompts: what to believe."),
    "rlalign_eval_diversity": Exported("gauge", "eval/diversity", "Distance between held-out images, base = 1."),
    "rlalign_kl": Exported("gauge", "kl", "Divergence from the base model."),
    "rlalign_ratio_max_abs_dev": Exported("gauge", "ratio/max_abs_dev", "Largest |ratio - 1| at a first update."),
    "rlalign_clip_fraction": Exported("gauge", "clip_fraction", "Share of ratios outside the clip range."),
    "rlalign_grad_norm": Exported("gauge", "grad_norm", "Length of the gradient before it is clipped."),
    "rlalign_staleness": Exported("gauge", "staleness", "Versions between sampling and trained weights."),
    "rlalign_weight_version": Exported("gauge", "version", "Version of the weights published last: step + 1."),
    "rlalign_images_per_second": Exported("gauge", "images_per_s", "Training images a second."),
    "rlalign_phase_seconds": Exported("gauge", "time/<phase>_s", "Seconds of a phase in one step, over all workers."),
    "rlalign_reward_seconds": Exported("gauge", "time/reward/<reward>_s", "Seconds spent in one reward in one step."),
    "rlalign_idle_seconds": Exported("gauge", "time/idle/<role>_s", "Seconds of a step that a worker idled, mean."),
    "rlalign_busy_share": Exported("gauge", "runtime/busy/<role>", "Share of a step that workers were busy, mean."),
    "rlalign_workers": Exported("gauge", "runtime/workers/<role>", "Live workers."),
    "rlalign_in_flight_bytes": Exported("gauge", "runtime/bytes_in_flight", "Trajectories and images on their way."),
    "rlalign_steps": Exported("total", "version", "Updates done."),
    "rlalign_images": Exported("total", "images", "Images generated for training."),
    "rlalign_restarts": Exported("total", "runtime/restarts/<role>", "Workers that were replaced."),
    "rlalign_reissued": Exported("total", "runtime/reissued", "Calls issued again after a worker's death."),
    "rlalign_reward_errors": Exported("sum", "runtime/reward/<reward>/errors", "Failed tries of a reward."),
    "rlalign_reward_timeouts": Exported("sum", "runtime/reward/<reward>/timeouts", "Tries that took too long."),
    "rlalign_reward_dropped": Exported("sum", "runtime/reward/<reward>/dropped", "Images left without a number."),
}


def prometheus_name(name: str) -> str:
    """As Prometheus sees it: Ray puts ray_ in front, and ends counters with _total."""
    return f"ray_{name}" if EXPORTED[name].kind == "gauge" else f"ray_{name}_total"


class Telemetry:
    """A sink for rows. ``gauge`` and ``counter`` make a metric of a name, a description and the names of its labels."""

    def __init__(self, run: str, gauge: Callable[..., Any], counter: Callable[..., Any]) -> None:
        self.run = run
        self.metrics = {
            name: (gauge if one.kind == "gauge" else counter)(name, one.meaning, ("run", *filter(None, [one.label])))
            for name, one in EXPORTED.items()
        }
        self.totals: dict[tuple[str, str], float] = {}

    def write(self, step: int, row: Mapping[str, float]) -> None:
        for key, value in {**row, "version": step + 1}.items():
            for name, one in EXPORTED.items():
                found = one.matches(key)
                if found is not None:
                    self._set(name, key, {"run": self.run, **({one.label: found[0]} if one.label else {})}, value)

    def close(self) -> None:
        """What was counted stays with the process, for a run that goes on in it."""

    def _set(self, name: str, key: str, labels: dict[str, str], value: float) -> None:
        metric, kind = self.metrics[name], EXPORTED[name].kind
        if kind == "gauge":
            metric.set(value, labels)
            return
        growth = value
        if kind == "total":
            growth = value - self.totals.get((name, key), 0)
            self.totals[name, key] = value  # after a return to a checkpoint it is lower, and steps count once more
        if growth > 0:  # Ray refuses to add nothing
            metric.inc(growth, labels)


@cache
def telemetry(run: str) -> Telemetry:
    """One a process, like the counters of Ray that it adds to."""
    from ray.util.metrics import Counter, Gauge

    return Telemetry(run, Gauge, Counter)
