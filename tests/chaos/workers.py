"""Kill and stop the workers of a real run on Ray again and again, and compare it with a calm one in one process.

python -m tests.chaos.workers quickstart evaluation.num_images=64 --algorithm nft --steps 20

One of two samplers is killed every 15 s, in turn; a scorer is stopped (SIGSTOP) after the third step; one sampler dies
while the weights of version 2 arrive. Weights and metrics must be those of the calm run, bit for bit. Also told: how
long a killed sampler was away, until it had verified its weights again.
"""

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rlalign import build, cli
from tests.chaos.kills import finish, result
from tests.runtime import faults
from tests.runtime.killing import kill, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--algorithm", default="nft")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=15.0, help="between two kills")
    parser.add_argument("--only-kills", action="store_true", help="one sampler at a time, and nothing else")
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        words = ["train", chosen.recipe, f"algorithm={chosen.algorithm}", *chosen.overrides]
        words += ["--steps", str(chosen.steps), "--run-dir"]
        calm, wild = Path(folder) / "calm", Path(folder) / "wild"
        finish([*words, str(calm)])
        kills, counts = wild_run([*words, str(wild)], wild, chosen.seconds, chosen.only_kills)
        (one, before), (other, after) = result(calm), result(wild)
        print(f"{chosen.algorithm}: SHA-256 of the final weights, calm and wild:\n{one}\n{other}")
        print(f"{len(kills)} kills by hand; {counts}")
        away = [f"{seconds:.1f}" for seconds in absences(wild, kills)]
        print(f"seconds from a kill to verified weights: {', '.join(away)}")
        assert one == other and before == after
        assert chosen.only_kills or (wild / "died-while-weights-arrived").exists()
        print(f"equal to the calm run, bit for bit, in {len(after)} rows")


def wild_run(
    words: list[str], run: Path, seconds: float, only_kills: bool
) -> tuple[list[tuple[str, float]], dict[str, float]]:
    """When which sampler was killed by hand, and what the runtime counted."""
    if not only_kills:
        build.sampler_from = partial(faults.dying_sampler, run=str(run))
    kills: list[tuple[str, float]] = []
    over = threading.Event()

    def kill_in_turn() -> None:
        while not over.wait(seconds):
            for worker in json.loads((run / "workers.json").read_text()) if rows(run) else ():
                if (worker["role"], worker["index"]) == ("sampler", len(kills) % 2) and worker["pid"]:
                    with suppress(ProcessLookupError):  # the file tells of one that is gone
                        os.kill(worker["pid"], signal.SIGKILL)
                        kills.append((f"sampler-{worker['index']}", time.time()))
                    break

    killer = threading.Thread(target=kill_in_turn, daemon=True)
    killer.start()
    if not only_kills:
        kill("scorer", 0, run, lambda: rows(run) >= 3, signal.SIGSTOP)
    at = words.index("--run-dir")
    more = ["runtime.kind=ray", "runtime.samplers=2", "runtime.scorers=2", "runtime.ping_timeout_s=10"]
    code = cli.run([*words[:at], *more, *words[at:]])
    over.set()
    killer.join()
    assert code == 0
    last: dict[str, Any] = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    names = ("runtime/restarts/sampler", "runtime/restarts/scorer", "runtime/reissued")
    return kills, {name: last[name] for name in names}


def absences(run: Path, kills: list[tuple[str, float]]) -> list[float]:
    """For each kill: seconds until that sampler had received and verified weights again."""
    spans = [json.loads(line) for line in (run / "spans.jsonl").read_text().splitlines()]
    back = [
        [span["end"] for span in spans if span["worker"] == name and span["method"] == "receive" and span["end"] > at]
        for name, at in kills
    ]
    return [min(ends) - at for ends, (_, at) in zip(back, kills, strict=True) if ends]


if __name__ == "__main__":
    main()
