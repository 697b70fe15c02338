"""The benchmark counts what runs through the network, and its table and curves say what the runs wrote."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from rlalign import build, loop
from rlalign.commands import train as command
from rlalign.plugins import module_from_file
from rlalign.policy import Policy

ROOT = Path(__file__).parents[2]
SMALL = "algorithm.num_times=2 rollout.prompts_per_step=2 rollout.samples_per_prompt=4 rollout.num_steps=3 "
SMALL += "rollout.micro_batch=8 evaluation.num_images=8 evaluation.num_steps=2 reporting.tensorboard=false "
SMALL += "rewards.0.use=saturation"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """What it replaces in rlalign is put back."""
    for holder, name in ((build, "load_policy"), (loop, "judge"), (command, "run_loop"), (Policy, "_guided")):
        monkeypatch.setattr(holder, name, getattr(holder, name))
    return module_from_file(ROOT / "benchmarks" / "comparison.py")


def result(benchmark, name: str, seed: int, *rewards: float):
    curve = [(step, reward) for step, reward in zip(range(0, 100, 10), rewards, strict=False)]
    return benchmark.Result(name, seed, 5760, curve, 0.9, 1000 * curve[-1][0], 10, 5.0, 2.0)


def test_passes_of_rollouts_and_updates_are_counted_and_evaluations_are_not(
    benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(benchmark, "STEPS", 2)
    monkeypatch.setattr(benchmark, "EVERY", 1)
    benchmark.one(SMALL, 0, tmp_path / "run")
    counts = json.loads((tmp_path / "run" / "counts.json").read_text())
    images, checks = 16, 3  # two steps of 8; beside the work itself the canary and the divergence take passes of 8
    assert counts["with_graph"] == images * 2
    work = images * (3 + 2 * 2)  # three steps; two times, each under the old weights and the present ones
    assert work <= counts["passes"] <= work + 8 * 2 * checks
    assert counts["cpu_s"] > 0 and counts["path_kl"] > 0
    read = benchmark.read("nft", 0, tmp_path / "run")
    assert [step for step, _ in read.curve] == [0, 1, 2] and read.images == images


def test_new_runs_join_those_that_are_published(benchmark, tmp_path: Path):
    published = [result(benchmark, "grpo", 0, 0.4, 0.5), result(benchmark, "nft", 0, 0.4, 0.6)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps([asdict(one) for one in published]))
    merged = benchmark.with_published(
        [result(benchmark, "nft", 1, 0.4, 0.7), result(benchmark, "grpo", 0, 0.4, 0.8)], path
    )
    assert [(one.name, one.seed, one.final) for one in merged] == [("nft", 0, 0.6), ("nft", 1, 0.7), ("grpo", 0, 0.8)]
    assert benchmark.with_published([], tmp_path / "none.json") == []


def test_the_cost_of_a_reward_is_read_off_between_evaluations(benchmark):
    run = result(benchmark, "nft", 0, 0.4, 0.5, 0.7)
    assert run.cost_of(0.6) == pytest.approx(15_000)
    assert run.cost_of(0.8) is None and run.cost_of(0.5) == pytest.approx(10_000)


def test_the_table_has_the_best_first_and_every_run(benchmark, tmp_path: Path):
    runs = [result(benchmark, name, seed, 0.4, end) for name, end in (("a", 0.5), ("b", 0.7)) for seed in (0, 1)]
    lines = benchmark.table(runs).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["**b**", "**a**", "b", "b", "a", "a"]
    assert {line.count("|") for line in lines} == {lines[0].count("|")} and "| 0.700 |" in lines[2]
    benchmark.plot(runs, tmp_path / "curves.png", ["b"])
    assert (tmp_path / "curves.png").stat().st_size > 1000
