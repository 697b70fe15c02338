"""All algorithms on the shipped pipeline: held-out accuracy against images, network evaluations and CPU seconds.

    python benchmarks/comparison.py --seeds 0 1 2 --jobs 2            # all rows of ROWS
    python benchmarks/comparison.py --only nft grpo --seeds 0

A run is the real command line in a process of its own, with one thread, and its folder under --to; runs that are
finished are not run again, and results that the docs have already stay. What is counted leaves evaluations out: passes
of the network, one a latent, in rollouts and updates, those that keep a graph for the backward pass, and CPU seconds
from the first step to the last.
The divergence is the same for all: path KL in nats of the trained policy from the base model, over the ten steps of
Flow-SDE with a = 0.7 (all but the last stochastic), on 64 held-out samples.
Writes table.md, results.json, curves.png and curves/NAME.png to --to; with --docs what the pages show, too.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STEPS, EVERY = 30, 10
KL_SAMPLES = 64
SHOWN = 9  # rows in colour where all are in one picture
PUBLISHED_RECIPE = "flow_grpo (published)"
FORWARD = "optimizer.lr=7e-4 algorithm.num_times=4"
SLOW = "optimizer.lr=2e-4 algorithm.num_times=4"
CHAIN = "optimizer.lr=5e-4"
PUBLISHED = Path(__file__).parents[1] / "docs" / "assets" / "comparison"
ROWS: dict[str, str] = {
    "nft": "",
    PUBLISHED_RECIPE: "algorithm=grpo rollout.window=null rollout.num_steps=10 rollout.last_step=sde_untrained "
    "optimizer.lr=3e-4 algorithm.kl_weight=0.04 algorithm.kl_form=no_tau algorithm.updates_per_step=2",
    "grpo": f"algorithm=grpo {CHAIN}",
    "awm": f"algorithm=awm {FORWARD}",
    "rvm": f"algorithm=rvm {SLOW}",
    "ram": f"algorithm=ram {FORWARD}",
    "dgpo": f"algorithm=dgpo {FORWARD}",
    "crd": f"algorithm=crd {FORWARD}",
    "epg": f"algorithm=epg {SLOW}",
    "fpo": f"algorithm=fpo {SLOW}",
    "rwr": f"algorithm=rwr {SLOW}",
    "raft": f"algorithm=raft {SLOW}",
    "dpo": f"algorithm=dpo {FORWARD}",
    "kto": f"algorithm=kto {FORWARD}",
    "grpo_guard": f"algorithm=grpo_guard {CHAIN}",
    "flow_dppo": f"algorithm=flow_dppo {CHAIN}",
    "ddpo": f"algorithm=ddpo {CHAIN}",
    "dpok": f"algorithm=dpok {CHAIN}",
    "d3po": f"algorithm=d3po {CHAIN}",
    "prdp": "algorithm=prdp optimizer.lr=2e-5",
    "spo": f"algorithm=spo {CHAIN}",
    "flow_grpo_fast": f"algorithm=flow_grpo_fast rollout.num_steps=10 {CHAIN}",
    "dance_grpo": f"algorithm=dance_grpo rollout.num_steps=16 {CHAIN}",
    "mix_grpo": f"algorithm=mix_grpo rollout.num_steps=25 rollout.window.hold=2 {CHAIN}",
    "mix_grpo_flash": f"algorithm=mix_grpo_flash rollout.num_steps=25 rollout.window.hold=2 {CHAIN}",
    "tempflow_grpo": f"algorithm=tempflow_grpo rollout.num_steps=10 {CHAIN}",
    "flash_grpo": f"algorithm=flash_grpo rollout.num_steps=20 {CHAIN}",
    "reinforce": f"algorithm=reinforce {CHAIN}",
    "pepg": f"algorithm=pepg {SLOW}",
    "par": f"algorithm=par {SLOW}",
    "ipo": f"algorithm=ipo {FORWARD}",
}
"""The quickstart with these changes. Learning rates are those that earlier sweeps found for nft and for grpo, one for
all that train on the forward process and one for all that train on the chain's steps. Those that fell at 7e-4 with
seed 0 (rvm 0.408, fpo 0.420, epg 0.400, rwr and raft 0.000) have 2e-4; prdp has 2e-5, its gradient explodes at 7e-4.
Papers' chains have the papers' number of steps; MixGRPO's window, which the paper moves every 25 training steps, moves
every 2, so that it gets through most of the chain in 30."""


class Counter:
    """Counts the work of a run from inside of it."""

    def __init__(self) -> None:
        self.passes = self.with_graph = 0
        self.cpu = 0.0
        self.counting = False
        self.policy: Any = None

    def install(self) -> None:
        import torch

        from rlalign import build, loop
        from rlalign.commands import train as command
        from rlalign.policy import Policy
        from rlalign.workers.learner import Learner

        load, judge, drift = build.load_policy, loop.judge, Learner.drift
        guided, run_loop = Policy._guided, command.run_loop

        def load_policy(config: Any) -> Any:
            self.policy = load(config)
            return self.policy

        def guided_and_counted(policy: Any, x: Any, times: Any, cond: Any, uncond: Any, scale: float) -> Any:
            if self.counting:
                passes = len(x) * (2 if uncond is not None and scale != 1 else 1)
                self.passes += passes
                self.with_graph += passes * torch.is_grad_enabled()
            return guided(policy, x, times, cond, uncond, scale)

        def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                self.counting, self.cpu = False, self.cpu + time.process_time()
                result = function(*args)
                self.counting, self.cpu = True, self.cpu - time.process_time()
                return result

            return call

        def loop_counted(*args: Any) -> None:
            self.counting, self.cpu = True, self.cpu - time.process_time()
            run_loop(*args)
            self.counting, self.cpu = False, self.cpu + time.process_time()

        build.load_policy, loop.judge, command.run_loop = load_policy, uncounted(judge), loop_counted
        Policy._guided = guided_and_counted
        Learner.drift = uncounted(drift)


def path_kl(policy: Any, prompts: Sequence[Any]) -> float:
    """Nats, mean over one sample of each of these prompts."""
    import torch

    from rlalign.mdp.noise import Noise
    from rlalign.types import Unit
    from rlalign.workers.sampler import Sampler

    changes = {"kernel": "flow_sde", "noise_level": 0.7, "window": None, "num_steps": 10, "train_fraction": 1.0}
    changes |= {"last_step": "ode", "solver": "euler", "cps_logprob": "gaussian", "retain": False, "candidates": None}
    known = {key: value for key, value in changes.items() if key in type(policy.settings).model_fields}
    policy.settings = policy.settings.model_copy(update=known)
    sampler = Sampler(policy, Noise(7), "policy", True, True)
    trajectory, _ = sampler.sample(Unit(0, tuple(range(len(prompts))), tuple(prompts), 1))
    sample = trajectory.take(torch.arange(len(prompts)))
    total = torch.zeros(len(prompts))
    with torch.no_grad():
        for slot in range(sample.num_kept):
            with policy.using("reference"):
                reference = policy.replay(sample, slot).gaussian
            total += policy.replay(sample, slot).gaussian.kl(reference, "sum")
    return float(total.mean())


def one(changes: str, seed: int, run: Path) -> None:
    """A run in this process; what it cost goes to counts.json."""
    from rlalign import cli

    counter = Counter()
    counter.install()
    words = ["train", "quickstart", *changes.split(), f"evaluation.every={EVERY}", "--steps", str(STEPS)]
    code = cli.run([*words, "--seed", str(seed), "--run-dir", str(run)])
    if code:
        raise SystemExit(code)
    import yaml

    from rlalign.prompts import PromptSet

    config = yaml.safe_load((run / "config.yaml").read_text())
    prompts = PromptSet.read(Path(config["prompts"]["heldout"])).first(KL_SAMPLES)
    counts = {"passes": counter.passes, "with_graph": counter.with_graph, "cpu_s": counter.cpu}
    counts["path_kl"] = path_kl(counter.policy, prompts)
    (run / "counts.json").write_text(json.dumps(counts))


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    name: str
    seed: int
    images: int
    curve: list[tuple[int, float]]  # steps, held-out reward
    diversity: float
    passes: int
    with_graph: int
    cpu_s: float
    path_kl: float

    @property
    def final(self) -> float:
        return self.curve[-1][1]

    def cost_of(self, reward: float) -> float | None:
        """Passes of the network until the curve, straight between evaluations, is at ``reward``; None: never."""
        for (step, low), (after, high) in zip(self.curve, self.curve[1:], strict=False):
            if low < reward <= high:
                return self.passes / self.curve[-1][0] * (step + (reward - low) / (high - low) * (after - step))
        return None


def read(name: str, seed: int, run: Path) -> Result:
    import yaml

    rollout = yaml.safe_load((run / "config.yaml").read_text())["rollout"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["eval/reward/mean"]) for line in lines if "eval/reward/mean" in line]
    curve.append((len(lines), lines[-1]["eval_final/reward/mean"]))
    images = rollout["prompts_per_step"] * rollout["samples_per_prompt"] * len(lines)
    counts = json.loads((run / "counts.json").read_text())
    return Result(name, seed, images, curve, lines[-1]["eval_final/diversity"], **counts)


def with_published(new: Sequence[Result], path: Path) -> list[Result]:
    """What is published, with these runs added or in place of their earlier selves; in the order of ``ROWS``."""
    known = json.loads(path.read_text()) if path.exists() else []
    results = {(one.name, one.seed): one for one in (*(Result(**entry) for entry in known), *new)}
    order = [*ROWS]
    return sorted(results.values(), key=lambda one: (order.index(one.name), one.seed))


def folder_of(name: str, seed: int, to: Path) -> Path:
    return to / f"{name.partition(' ')[0]}_seed{seed}"


def train(name: str, seed: int, to: Path, script: str = __file__) -> None:
    """By ``script --one`` in a process of its own."""
    run = folder_of(name, seed, to)
    if (run / "counts.json").exists():
        return
    call = [sys.executable, script, "--one", name, "--seeds", str(seed), "--to", str(to)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=False)
    print(f"{name}, seed {seed}: {'done' if not done.returncode else done.stderr[-300:]}", flush=True)


def table(results: Sequence[Result]) -> str:
    """A row of means an algorithm, best first, with the costs of its last seed; then a row a run."""
    head = "| | seed | before | " + " | ".join(f"{step} steps" for step, _ in results[0].curve[1:])
    lines = [f"{head} | diversity | path KL, nats | images | network passes | of these with graph | CPU s |"]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    of = {name: [result for result in results if result.name == name] for name in best(results)}
    lines += [_row(f"**{name}**", f"mean of {len(same)}", same) for name, same in of.items()]
    lines += [_row(name, str(result.seed), [result]) for name, same in of.items() for result in same]
    return "\n".join(lines) + "\n"


def _row(name: str, seed: str, results: Sequence[Result]) -> str:
    rewards = zip(*([reward for _, reward in result.curve] for result in results), strict=True)
    curve = " | ".join(f"{fmean(values):.3f}" for values in rewards)
    last = results[-1]
    diversity, kl = (fmean(getattr(r, key) for r in results) for key in ("diversity", "path_kl"))
    return (
        f"| {name} | {seed} | {curve} | {diversity:.2f} | {kl:.3g} | {last.images:,} | {last.passes:,} | "
        f"{last.with_graph:,} | {last.cpu_s:.0f} |"
    )


def plot(results: Sequence[Result], path: Path, loud: Sequence[str]) -> None:
    """Means over seeds against passes of the network; those called ``loud`` in colour, the others grey.

    One that is loud alone is shown with its seeds.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in (*({result.name for result in results} - {*loud}), *loud):
        same = [result for result in results if result.name == name]
        steps = [step for step, _ in same[0].curve]
        means = [fmean(r.curve[i][1] for r in same) for i in range(len(steps))]
        passes = [step * same[-1].passes / steps[-1] / 1000 for step in steps]
        if name not in loud:
            axes.plot(passes, means, color="0.85")
            continue
        color = f"C{loud.index(name)}"
        axes.plot(passes, means, color=color, label=name, zorder=3)
        for result in same if len(loud) == 1 else ():
            axes.plot(passes, [reward for _, reward in result.curve], color=color, alpha=0.35, zorder=2)
    axes.set(xlabel="thousand passes of the network", ylabel="held-out composition accuracy")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def best(results: Sequence[Result]) -> list[str]:
    """Names, by their mean at the end."""
    means = {name: fmean(r.final for r in results if r.name == name) for name in {r.name for r in results}}
    return sorted(means, key=lambda name: -means[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*ROWS], default=[*ROWS], metavar="NAME", help="rows of ROWS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--to", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--docs", action="store_true", help="copy results and curves to docs/assets/comparison")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one is not None:
        return one(ROWS[chosen.one], chosen.seeds[0], folder_of(chosen.one, chosen.seeds[0], chosen.to))
    (chosen.to / "curves").mkdir(parents=True, exist_ok=True)
    asked = [(name, seed) for seed in chosen.seeds for name in chosen.only]
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for done in [pool.submit(train, name, seed, chosen.to) for name, seed in asked]:
            done.result()
    there = [run for run in asked if (folder_of(*run, chosen.to) / "counts.json").exists()]
    new = [read(name, seed, folder_of(name, seed, chosen.to)) for name, seed in there]
    results = with_published(new, PUBLISHED / "results.json")
    (chosen.to / "table.md").write_text(table(results))
    (chosen.to / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    plot(results, chosen.to / "curves.png", [*best(results)[:SHOWN], PUBLISHED_RECIPE])
    for name in dict.fromkeys(result.name for result in results):
        plot(results, chosen.to / "curves" / f"{name.partition(' ')[0]}.png", [name])
    if chosen.docs:
        shutil.copytree(chosen.to / "curves", PUBLISHED, dirs_exist_ok=True)
        for name in ("curves.png", "results.json"):
            shutil.copy(chosen.to / name, PUBLISHED)
    print(table(results))


if __name__ == "__main__":
    main()
