"""Rows as Prometheus metrics: what Ray is told, and that the dashboard draws exactly what is exported."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from rlalign.reporting.glossary import explain
from rlalign.reporting.sinks import ReportingConfig, make_sinks
from rlalign.runtime import telemetry
from rlalign.runtime.telemetry import EXPORTED, Telemetry, prometheus_name
from tests.reporting.example import config, example_run

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "rlalign.json"
ROW = {
    "reward/mean": 0.5,
    "reward/jpeg/mean": -1.5,
    "time/rollout_s": 2.0,
    "time/reward/jpeg_s": 0.25,
    "time/idle/sampler_s": 1.0,
    "runtime/busy/sampler": 0.75,
    "runtime/busy/sampler/min": 0.5,
    "runtime/workers/sampler": 2.0,
    "runtime/restarts/sampler": 1.0,
    "runtime/reissued": 0.0,
    "runtime/reward/jpeg/dropped": 3.0,
    "images": 64,
}


class Fake:
    """A gauge or counter that keeps what it is told, as strict as Ray's."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert re.fullmatch(r"[a-z_]+", name) and description
        self.keys, self.values = tag_keys, defaultdict[tuple[str, ...], float](float)

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[self._key(tags)] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses it"
        self.values[self._key(tags)] += value

    def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
        assert set(tags) == set(self.keys)
        return tuple(tags[key] for key in self.keys)


@pytest.fixture
def sink() -> Telemetry:
    return Telemetry("mine", Fake, Fake)


def told(sink: Telemetry) -> dict[str, dict[tuple[str, ...], float]]:
    return {name: dict(metric.values) for name, metric in sink.metrics.items() if metric.values}


def test_a_row_sets_gauges_and_adds_to_counters(sink: Telemetry) -> None:
    sink.write(6, ROW)
    assert told(sink) == {
        "rlalign_reward_mean": {("mine",): 0.5},
        "rlalign_reward": {("mine", "jpeg"): -1.5},
        "rlalign_phase_seconds": {("mine", "rollout"): 2.0},
        "rlalign_reward_seconds": {("mine", "jpeg"): 0.25},
        "rlalign_idle_seconds": {("mine", "sampler"): 1.0},
        "rlalign_busy_share": {("mine", "sampler"): 0.75},
        "rlalign_workers": {("mine", "sampler"): 2.0},
        "rlalign_restarts": {("mine", "sampler"): 1.0},
        "rlalign_reward_dropped": {("mine", "jpeg"): 3.0},
        "rlalign_weight_version": {("mine",): 7},
        "rlalign_steps": {("mine",): 7},
        "rlalign_images": {("mine",): 64},
    }


def test_totals_grow_by_what_came_to_them_and_sums_by_the_row(sink: Telemetry) -> None:
    for step, (images, dropped) in enumerate([(64, 1), (128, 0), (192, 2)]):
        sink.write(step, {"images": images, "runtime/reward/jpeg/dropped": dropped})
    assert told(sink)["rlalign_images"] == {("mine",): 192} and told(sink)["rlalign_steps"] == {("mine",): 3}
    assert told(sink)["rlalign_reward_dropped"] == {("mine", "jpeg"): 3}


def test_steps_that_are_repeated_after_a_checkpoint_count_again(sink: Telemetry) -> None:
    for step in (0, 1, 2, 1, 2):
        sink.write(step, {"images": 64 * (step + 1)})
    assert told(sink)["rlalign_images"] == {("mine",): 4 * 64}  # the first of the repeated ones is not seen
    assert told(sink)["rlalign_weight_version"] == {("mine",): 3}


def test_every_exported_number_is_a_metric_of_the_glossary() -> None:
    rows = [one.row.replace("<phase>", "rollout") for one in EXPORTED.values() if one.row != "version"]
    names = [re.sub(r"<\w+>", "x", row) for row in rows]
    assert [name for name in names if explain(name) is None] == []
    assert all(re.fullmatch(r"[a-z_]+", name) for name in EXPORTED)
    assert prometheus_name("rlalign_kl") == "ray_rlalign_kl"
    assert prometheus_name("rlalign_images") == "ray_rlalign_images_total"


def test_only_a_run_on_ray_has_the_sink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlalign.reporting.sinks.telemetry", lambda run: ("telemetry", run))
    settings = ReportingConfig(tensorboard=False)
    with example_run(tmp_path / "mine") as run:
        assert make_sinks(settings, run, config(2)) == []
        assert make_sinks(settings, run, {**config(2), "runtime": {"kind": "local"}}) == []
        assert make_sinks(settings, run, {**config(2), "runtime": {"kind": "ray"}}) == [("telemetry", "mine")]


def test_rays_own_metrics_take_these_names() -> None:
    """Without a cluster Ray keeps the numbers to itself; it complains of names and labels all the same."""
    one = telemetry.telemetry("test")
    assert telemetry.telemetry("test") is one
    one.write(0, ROW)
    one.close()


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def test_the_dashboard_draws_what_is_exported_and_nothing_else(dashboard: dict[str, Any]) -> None:
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    used = {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)}
    assert used == {prometheus_name(name) for name in EXPORTED}
    assert all('{run=~"$run"}' in expression for expression in expressions)
    counters = [e for e in expressions if "_total" in e]
    assert all(re.search(r"(rate|increase)\(ray_\w+_total\{[^}]*\}\[\w+\]\)", e) for e in counters)


def test_legends_name_labels_that_there_are(dashboard: dict[str, Any]) -> None:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            (name,) = re.findall(r"ray_(\w+?)(?:_total)?\{", target["expr"])
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= {"run", EXPORTED[name].label}


def test_the_dashboard_can_be_imported(dashboard: dict[str, Any]) -> None:
    assert dashboard["title"] == "rlalign" and dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"] and panel["description"] and panel["targets"]
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references)
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert names == ["datasource", "run"]
