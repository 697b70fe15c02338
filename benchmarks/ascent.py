"""Methods that differentiate the reward, on the shipped pipeline, side by side: held-out saturation by steps.

    python benchmarks/ascent.py --seeds 0            # all rows of ROWS, finished runs are not run again
    python benchmarks/ascent.py --seeds 0 --docs     # and copies results and picture to docs/assets/comparison

Composition accuracy, the reward of comparison.py, is a count and has no gradient. `saturation` has one, and is easy to
exaggerate; composition is watched, to see what it costs. NFT and GRPO are there to compare with. Runs, counts and CPU
seconds are those of comparison.py, in fewer steps.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comparison
import matplotlib.pyplot as plt
from comparison import folder_of, one, read, train

STEPS, EVERY = 12, 4
REWARD = 'rewards=[{"use":"saturation"},{"use":"composition","role":"heldout"}]'
ASCENT = f"{REWARD} optimizer.lr=7e-4 algorithm.checkpointing=false"  # a pass made again would count twice
ROWS = {
    "draft": f"algorithm=draft {ASCENT}",
    "draft_lv": f"algorithm=draft_lv {ASCENT}",
    "alignprop": f"algorithm=alignprop {ASCENT}",
    "drtune": f"algorithm=drtune {ASCENT}",
    "refl": f"algorithm=refl {ASCENT}",
    "nft (saturation)": REWARD,
    "grpo (saturation)": f"algorithm=grpo {REWARD} {comparison.CHAIN}",
}
"""The quickstart with these changes; NFT's learning rate, the quickstart's, for all that differentiate the reward too
(with 1e-4 they are at 0.16 to 0.17 after 12 steps), and the comparison's for GRPO."""


def told(name: str, seed: int, to: Path) -> dict[str, Any]:
    """What comparison.py tells of a run, and the held-out curve of composition."""
    run = folder_of(name, seed, to)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    key = "eval/reward/composition/mean"
    curve = [(line["step"], line[key]) for line in lines if key in line]
    curve.append((len(lines), lines[-1]["eval_final/reward/composition/mean"]))
    return {**asdict(read(name, seed, run)), "heldout": curve}


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Saturation, and what becomes of composition, by steps."""
    figure, both = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, key, label in zip(both, ("curve", "heldout"), ("saturation", "composition accuracy"), strict=True):
        for number, run in enumerate(results):
            steps, values = zip(*run[key], strict=True)
            axes.plot(steps, values, label=run["name"], color=f"C{number}")
        axes.set(xlabel="steps of 192 images", ylabel=f"held-out {label}")
        axes.grid(alpha=0.3)
    both[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    comparison.STEPS, comparison.EVERY = STEPS, EVERY  # pyright: ignore[reportConstantRedefinition]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*ROWS], default=[*ROWS], metavar="NAME", help="rows of ROWS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--to", type=Path, default=Path("runs/ascent"))
    parser.add_argument("--docs", action="store_true", help="copy results and picture to docs/assets/comparison")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one is not None:
        return one(ROWS[chosen.one], chosen.seeds[0], folder_of(chosen.one, chosen.seeds[0], chosen.to))
    chosen.to.mkdir(parents=True, exist_ok=True)
    for seed in chosen.seeds:
        for name in chosen.only:
            train(name, seed, chosen.to, __file__)
    asked = [(name, seed) for seed in chosen.seeds for name in ROWS]
    there = [run for run in asked if (folder_of(*run, chosen.to) / "counts.json").exists()]
    results = [told(name, seed, chosen.to) for name, seed in there]
    to = Path(__file__).parents[1] / "docs" / "assets" / "comparison" if chosen.docs else chosen.to
    (to / "saturation.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, to / "saturation.png")
    for run in results:
        print(f"{run['name']}: saturation {run['curve'][-1][1]:.3f}, composition {run['heldout'][-1][1]:.3f}")


if __name__ == "__main__":
    main()
