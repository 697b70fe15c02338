"""A reward in a process of its own: loads it, then answers batches one after the other.

Started as `python -m rlalign.scoring.child`, by a scorer (`apart`) or by the reward service. Batches come on standard
input as safetensors (`wire`), answers go to what was standard output as JSON, each with its length in front. What the
reward prints goes to standard error. It ends when its input does, so it never outlives its parent by more than a call.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from rlalign.scoring import Reward, RewardConfig, frames, load_reward, wire
from rlalign.scoring.call import TimedOut, call
from rlalign.scoring.caller import in_words

OWN = wire.Budget(sys.maxsize, sys.maxsize)  # the parent has counted already


def main() -> None:
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    told = frames.read(sys.stdin.buffer)
    if told is None:
        return
    settings = json.loads(told)
    torch.set_num_threads(settings["threads"])
    try:
        reward = loaded(RewardConfig(**settings["reward"]), Path(settings["folder"]))
    except ValueError as error:
        frames.write_json(own, {"refused": " ".join(str(error).split())})
        return
    frames.write_json(own, {"groupwise": reward.groupwise})
    while (batch := frames.read(sys.stdin.buffer)) is not None:
        answer = scored(reward, batch)
        frames.write_json(own, answer)
        if "timed_out" in answer:
            os._exit(1)  # the thread that hangs cannot be ended otherwise


def loaded(config: RewardConfig, folder: Path) -> Reward:
    reward = load_reward(config, folder)
    if reward.of_recordings:
        raise ValueError(f"reward {config.name!r} reads the run's own recordings and cannot be in another process")
    return reward


def scored(reward: Reward, batch: bytes) -> dict[str, Any]:
    """{"columns": {"score": [...], ...}}, or {"error": sentence} and perhaps "timed_out"."""
    images, prompts = wire.read(wire.SAFETENSORS, batch, OWN)
    try:
        answer = call(reward, images, prompts)
    except TimedOut as error:
        return {"error": str(error), "timed_out": True}
    except Exception as error:
        return {"error": " ".join(in_words(error).split())}
    columns = {"score": answer.score} | answer.details
    return {"columns": {name: numbers.tolist() for name, numbers in columns.items()}}


if __name__ == "__main__":
    main()
