"""A reward with packages of its own: a child process of the scorer's, on the same machine, under another interpreter.

    rewards:
      - {use: "my_hps.py:score", venv: /envs/hps}
      - {use: "my_hps.py:score", pip: [hpsv2, "transformers<5"]}

The child (`child`) loads the reward and keeps it. It gets pictures as safetensors over a pipe and answers with numbers,
which are those of the reward called here, to the last bit. A child that dies in a call is replaced and asked again, so
a kill costs time and no picture; a call that ends several of them one after the other fails. One that hangs is killed
with all that it started: nothing is left behind, unlike the thread of a reward in this process. When this process ends,
however that happens, it ends after the call that it is at.
"""

import json
import logging
import os
import signal
import subprocess
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Timer
from typing import Any

import torch
from torch import Tensor

from rlalign.scoring import frames, wire
from rlalign.scoring.answer import CallFailed
from rlalign.scoring.call import TimedOut
from rlalign.scoring.config import RewardConfig
from rlalign.types import Prompt

# The pipes are put aside before the first import: torch and a reward's packages print, and may read.
CHILD = (
    "-c",
    "import os; pipes = os.dup(0), os.dup(1); os.dup2(os.open(os.devnull, os.O_RDONLY), 0); os.dup2(2, 1); "
    "from rlalign.scoring.child import main; main(*pipes)",
)
POISON = 3  # children that a call may end, one after the other
GRACE_S = 5.0  # what holds Python's lock cannot notice its own timeout
END_S = 5.0  # for a child to end by itself
LOAD_S = 3600.0  # for a child to load its reward, which may have to be fetched first

_log = logging.getLogger("rlalign")
_Process = subprocess.Popen[bytes]


class Apart:
    """Owns the child; called like any reward. It keeps the reward's timeout itself, which does not count the start."""

    def __init__(self, config: RewardConfig, python: Path, folder: Path) -> None:
        """ValueError, one sentence, when the reward cannot be loaded there."""
        self._name, self._timeout_s, self._python = config.name, config.timeout_s, python
        self._told = {
            "reward": config.model_dump(mode="json", exclude={"venv", "pip"}),
            "folder": str(folder.absolute()),
            "threads": torch.get_num_threads(),
        }
        self._process: _Process | None = None
        self.groupwise: bool = self._start()["groupwise"]

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, list[float]]:
        """The score and the details, one number a picture. images: uint8 [B, (F,) 3, H, W]"""
        body = _packed(images, prompts)
        for _ in range(POISON):
            answer = self._answer(body)
            if answer is not None:
                return self._columns(answer)
        raise CallFailed(f"it ended {POISON} processes, one after the other")

    # --- life of the child

    def _start(self) -> dict[str, Any]:
        """What it says of the reward once that is loaded, which may take minutes."""
        try:
            # A session of its own: Ctrl-C is for the run, which finishes its step.
            process = subprocess.Popen(
                [self._python, *CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise ValueError(f"{self._python} cannot be started: {error.strerror}") from None
        self._process, self._ended = process, weakref.finalize(self, _end, process)
        hello, late = _within(LOAD_S, process, json.dumps(self._told).encode())
        if hello is None:
            self._end()
            if late:
                raise ValueError(f"{self._python} did not load the reward within {LOAD_S:g} s")
            raise ValueError(f"{self._python} ended while it loaded the reward{_why(self._python)}")
        if "refused" in hello:
            self._end()
            raise ValueError(hello["refused"].removeprefix(f"reward {self._name!r}: "))
        return hello

    def _end(self) -> None:
        self._ended()
        self._process = None

    # --- its work

    def _answer(self, body: bytes) -> dict[str, Any] | None:
        """None when the child died in the call."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None
        answer, late = _within(self._timeout_s + GRACE_S, process, body)
        if answer is None or "left_behind" in answer:
            self._end()
            _log.warning(
                "the process of reward %r ended (exit code %d); it is replaced", self._name, process.returncode
            )
        if answer is None and late:
            raise TimedOut(f"no answer within {self._timeout_s:g} s")
        return answer

    def _columns(self, answer: dict[str, Any]) -> dict[str, list[float]]:
        if "columns" in answer:
            return answer["columns"]
        raise (TimedOut if "timed_out" in answer else CallFailed)(answer["error"])


def _packed(images: Tensor, prompts: Sequence[Prompt]) -> bytes:
    try:
        return wire.as_safetensors(images, prompts)
    except TypeError as error:
        raise CallFailed(f"a prompt's metadata cannot be sent as JSON: {error}") from None


def _within(seconds: float, process: _Process, body: bytes) -> tuple[dict[str, Any] | None, bool]:
    """The child's answer, None when it is gone, and whether it was killed because it was late."""
    late = Event()

    def give_up() -> None:
        late.set()
        kill(process.pid)

    timer = Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        return _exchange(process, body), late.is_set()
    finally:
        timer.cancel()


def _exchange(process: _Process, body: bytes) -> dict[str, Any] | None:
    """None when the child is gone."""
    assert process.stdin is not None and process.stdout is not None
    try:
        frames.write(process.stdin, body)
        answer = frames.read(process.stdout)
    except OSError:
        return None
    return None if answer is None else json.loads(answer)


def _end(process: _Process) -> None:
    """It ends as its input does, or is killed, and so is what it started; waited for, so that no zombie stays."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):  # what was not sent yet cannot be sent
        process.stdin.close()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    kill(process.pid)
    process.wait()
    process.stdout.close()


def kill(pid: int) -> None:
    """A child and what it started, a pool of processes for instance: its session is one group."""
    with suppress(ProcessLookupError, PermissionError):  # none is left; of zombies alone, in macOS's words
        os.killpg(pid, signal.SIGKILL)


def _why(python: Path) -> str:
    """The last line of what the interpreter says when it imports the child's code, if that is what fails."""
    tried = subprocess.run([python, "-c", "import rlalign.scoring.child"], capture_output=True, text=True)
    words = tried.stderr.strip().splitlines()[-1:] if tried.returncode else []
    return "".join(f": {line}; `pip: []` beside venv installs what a reward needs" for line in words)
