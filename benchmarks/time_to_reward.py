"""Held-out reward against images and seconds, over recipes, algorithms and seeds.

    python benchmarks/time_to_reward.py --run quickstart --run "quickstart algorithm=grpo" --seeds 0 1 2 --jobs 2

Every run is the real command line in a process of its own, with its own run directory under --to. Runs that are
finished already are not run again. Writes a table (Markdown) and the curves (PNG) to --to.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Curve:
    """One finished run."""

    name: str
    seed: int
    images_per_step: int
    rows: list[dict[str, Any]]

    @property
    def base(self) -> float:
        return self.rows[0]["eval/reward/mean"]

    @property
    def final(self) -> float:
        return self.rows[-1]["eval_final/reward/mean"]

    @property
    def diversity(self) -> float:
        return self.rows[-1]["eval_final/diversity"]

    @property
    def seconds(self) -> float:
        """Training alone: rollout, reward, update and publishing, evaluation not counted."""
        return sum(row["time/step_s"] for row in self.rows)

    @property
    def images(self) -> int:
        return self.images_per_step * len(self.rows)

    def points(self) -> tuple[list[int], list[float]]:
        """Images seen by the weights that each evaluation judged, and the held-out reward."""
        judged = [(row["step"], row["eval/reward/mean"]) for row in self.rows if "eval/reward/mean" in row]
        judged.append((len(self.rows), self.final))
        return [step * self.images_per_step for step, _ in judged], [reward for _, reward in judged]


def train(command: str, seed: int, folder: Path) -> Curve:
    """Runs the command line unless the run is there, and reads what it wrote."""
    run = folder / f"{command.replace(' ', '_').replace('=', '-').replace('/', '-')}_seed{seed}"
    call = [sys.executable, "-m", "rlalign", "train", *shlex.split(command), "--seed", str(seed), "--run-dir", str(run)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(call)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    import yaml

    rollout = yaml.safe_load((run / "config.yaml").read_text())["rollout"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Curve(command, seed, rollout["prompts_per_step"] * rollout["samples_per_prompt"], rows)


def table(curves: Sequence[Curve]) -> str:
    """A row a run, then a row of means a command."""
    lines = [
        "| run | seed | held-out before | after | gain | diversity | images | training seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        lines.append(_row(curve.name, str(curve.seed), [curve]))
    for name in dict.fromkeys(curve.name for curve in curves):
        same = [curve for curve in curves if curve.name == name]
        if len(same) > 1:
            lines.append(_row(f"**{name}**", f"mean of {len(same)}", same))
    return "\n".join(lines) + "\n"


def _row(name: str, seed: str, curves: Sequence[Curve]) -> str:
    def mean(values: Sequence[float]) -> float:
        return statistics.fmean(values)

    before, after = mean([c.base for c in curves]), mean([c.final for c in curves])
    return (
        f"| {name} | {seed} | {before:.3f} | {after:.3f} | {after - before:+.3f} | "
        f"{mean([c.diversity for c in curves]):.2f} | {curves[0].images:,} | {mean([c.seconds for c in curves]):.0f} |"
    )


def plot(curves: Sequence[Curve], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(curve.name for curve in curves))}
    seen: set[str] = set()
    for curve in curves:
        label = None if curve.name in seen else curve.name
        seen.add(curve.name)
        axes.plot(*curve.points(), color=colours[curve.name], label=label, alpha=0.8)
    axes.set(xlabel="images generated", ylabel="held-out reward", title="Held-out reward, every seed a line")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, help="what follows `rlalign train`; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--to", type=Path, default=Path("runs/time_to_reward"))
    arguments = parser.parse_args()
    arguments.to.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = [
            pool.submit(train, command, seed, arguments.to) for command in arguments.run for seed in arguments.seeds
        ]
        curves = [run.result() for run in runs]
    (arguments.to / "table.md").write_text(table(curves))
    plot(curves, arguments.to / "curves.png")
    print(table(curves))


if __name__ == "__main__":
    main()
