"""What `rollout.retain` saves and takes: CPU seconds of rollout and update, and bytes that are kept between the two.

Once with the graphs of trained steps, once with the gradients of their rows in place of the graphs, once with neither.

    python benchmarks/retain.py            # a table
    python benchmarks/retain.py --json     # one line

The workload is that of overhead.py with one update a step, the same images on all sides. Every round measures all of
them one after the other; the numbers are medians of rounds.
"""

import argparse
import json
from collections.abc import Sequence
from statistics import median
from typing import Any

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
        "gradients": overhead.Ours(family, parameters, rows, updates=1, retain="gradients"),
    }
    kept: dict[str, float] = {}
    seconds: dict[str, list[float]] = {f"{side}_{part}_s": [] for side in sides for part in PARTS}
    for number in range(rounds + 1):
        for name, side in sides.items():
            taken = {f"{name}_rollout_s": overhead.cpu_seconds(side.rollout)}
            kept[f"{name}_bytes"] = bytes_kept(side)
            taken[f"{name}_update_s"] = overhead.cpu_seconds(side.update)
            side.trajectories = []  # with them go the graphs
            if number:  # the first round warms up
                for key, value in taken.items():
                    seconds[key].append(value)
    result = {key: median(values) for key, values in seconds.items()} | kept
    for side in sides:
        result[f"{side}_total_s"] = sum(result[f"{side}_{part}_s"] for part in PARTS)
    for part in (*PARTS, "total"):
        result[f"{part}_speedup"] = result[f"replay_{part}_s"] / result[f"retain_{part}_s"]
        result[f"gradients_{part}_speedup"] = result[f"replay_{part}_s"] / result[f"gradients_{part}_s"]
    return result | {"rounds": rounds, "rows_per_pass": rows}


def bytes_kept(side: overhead.Ours) -> float:
    """Of what graphs hold for the way back, each memory once, without the weights, which are there anyway."""
    there = {
        t.untyped_storage().data_ptr() for t in side.learner.policy.family.nets["transformer"].state_dict().values()
    }
    found: dict[int, int] = {}
    for graph in (graph for trajectory in side.trajectories for graph in trajectory.graphs):
        nodes, seen = [graph.log_probs.grad_fn], set[object]()
        while nodes:
            node: Any = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")] + getattr(
                node, "gradients", []
            )
            for tensor in (one for one in held if isinstance(one, torch.Tensor)):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in there:
                    found[storage.data_ptr()] = storage.nbytes()
    return float(sum(found.values()))


def table(result: dict[str, float]) -> str:
    lines = [f"{'CPU seconds':14}{'replay':>9}{'retain':>9}{'faster':>9}{'gradients':>11}{'faster':>9}"]
    for part in (*PARTS, "total"):
        numbers = [result[f"{side}_{part}_s"] for side in ("replay", "retain", "gradients")]
        faster = (result[f"{part}_speedup"], result[f"gradients_{part}_speedup"])
        lines.append(f"{part:14}{numbers[0]:9.3f}{numbers[1]:9.3f}{faster[0]:9.3f}{numbers[2]:11.3f}{faster[1]:9.3f}")
    mib = [result[f"{side}_bytes"] / 2**20 for side in ("replay", "retain", "gradients")]
    lines.append(f"{'MiB kept':14}{mib[0]:9.1f}{mib[1]:9.1f}{'':9}{mib[2]:11.1f}")
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
