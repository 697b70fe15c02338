"""A reward in a process of its own: loads it, then answers batches one after the other.

Started by `apart.CHILD`, by a scorer or by the reward service. Batches come as safetensors (`wire`), answers go out as
JSON, each with its length in front, on two descriptors that were standard input and output. Standard input is empty
from then on, and what is printed goes to standard error. It ends when its batches do, so it outlives its parent by no
more than a call.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from rlalign.scoring import Reward, RewardConfig, frames, load_reward, wire
from rlalign.scoring.call import LeftBehind, TimedOut, call, spends
from rlalign.scoring.caller import in_words

OWN = wire.Budget(sys.maxsize, sys.maxsize)  # the parent has counted already


def main(source: int, target: int) -> None:
    os.register_at_fork(after_in_child=lambda: _let_go(source, target))
    batches, own = os.fdopen(source, "rb"), os.fdopen(target, "wb")
    told = frames.read(batches)
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
    worked = False
    while (batch := frames.read(batches)) is not None:
        answer = scored(reward, batch)
        if worked and "full" in answer:
            print(f"the process of reward {reward.config.name!r} is full: {answer['error']}", file=sys.stderr)
            os._exit(1)  # unanswered: the parent asks a new one
        frames.write_json(own, answer)
        if "left_behind" in answer:
            os._exit(1)  # the thread that hangs cannot be ended otherwise
        worked |= "columns" in answer


def _let_go(*descriptors: int) -> None:
    """What a reward forks must not hold the pipes open: the parent sees by their end that this process died."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)


def loaded(config: RewardConfig, folder: Path) -> Reward:
    reward = load_reward(config, folder)
    if reward.of_recordings:
        raise ValueError(f"reward {config.name!r} reads the run's own recordings and cannot be in another process")
    return reward


def scored(reward: Reward, batch: bytes) -> dict[str, Any]:
    """{"columns": {"score": [...], ...}}, or {"error": sentence} and what is to be known of it.

    "timed_out", "left_behind" where the call still runs as well, "full" where another process may do better.
    """
    images, prompts = wire.read(wire.SAFETENSORS, batch, OWN)
    try:
        answer = call(reward, images, prompts)
    except LeftBehind as error:
        return {"error": str(error), "timed_out": True, "left_behind": True}
    except TimedOut as error:
        return {"error": str(error), "timed_out": True}
    except Exception as error:
        return {"error": " ".join(in_words(error).split())} | ({"full": True} if spends(error) else {})
    columns = {"score": answer.score} | answer.details
    return {"columns": {name: numbers.tolist() for name, numbers in columns.items()}}
