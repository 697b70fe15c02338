"""What `rollout.retain` saves: CPU seconds of rollout and update with the graphs of trained steps kept, and without.

    python benchmarks/retain.py            # a table
    python benchmarks/retain.py --json     # one line

The workload is that of overhead.py with one update a step, the same images on both sides. Every round measures both one
after the other; the numbers are medians of rounds.
"""

import argparse
import json
from collections.abc import Sequence
from statistics import median

import overhead
import torch

from rlalign.models.lora import LoraConfig, attach

PARTS = ("rollout", "update")


def measure(work: overhead.Workload, rounds: int, rows: int) -> dict[str, float]:
    """Median seconds by "<side>_<part>_s", and how many times faster keeping the graphs is."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    family = overhead.Family(work)
    parameters = attach(family.nets, ["transformer"], LoraConfig(rank=8, alpha=16), family.lora_targets, seed=0)
    sides = {
        "replay": overhead.Ours(family, parameters, rows, updates=1),
        "retain": overhead.Ours(family, parameters, rows, updates=1, retain=True),
    }
    seconds: dict[str, list[float]] = {f"{side}_{part}_s": [] for side in sides for part in PARTS}
    for number in range(rounds + 1):
        for name, side in sides.items():
            taken = {f"{name}_rollout_s": overhead.cpu_seconds(side.rollout)}
            taken[f"{name}_update_s"] = overhead.cpu_seconds(side.update)
            side.trajectories = []  # with them go the graphs
            if number:  # the first round warms up
                for key, value in taken.items():
                    seconds[key].append(value)
    result = {key: median(values) for key, values in seconds.items()}
    for part in PARTS:
        result[f"{part}_speedup"] = result[f"replay_{part}_s"] / result[f"retain_{part}_s"]
    whole = {side: sum(result[f"{side}_{part}_s"] for part in PARTS) for side in sides}
    return result | {"total_speedup": whole["replay"] / whole["retain"], "rounds": rounds, "rows_per_pass": rows}


def table(result: dict[str, float]) -> str:
    lines = [f"{'CPU seconds':14}{'replay':>9}{'retain':>9}{'faster':>9}"]
    for part in PARTS:
        numbers = (result[f"replay_{part}_s"], result[f"retain_{part}_s"], result[f"{part}_speedup"])
        lines.append(f"{part:14}" + "".join(f"{number:9.3f}" for number in numbers))
    lines.append(f"{'total':32}{result['total_speedup']:9.3f}")
    return "\n".join([*lines, f"{int(result['rows_per_pass'])} rows a pass, median of {int(result['rounds'])} rounds"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="of one pass of the net")
    parser.add_argument("--tiny", action="store_true", help="a workload of a second, to see that it runs")
    chosen = parser.parse_args(arguments)
    small = overhead.Workload(layers=1, heads=2, head_dim=8, channels=4, side=8, tokens=7, steps=4)
    result = measure(small if chosen.tiny else overhead.Workload(), chosen.rounds, chosen.rows)
    print(json.dumps(result) if chosen.json else table(result))


if __name__ == "__main__":
    main()
