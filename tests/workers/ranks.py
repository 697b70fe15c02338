"""Real learner ranks: processes in one gloo group, that do what they are told all at the same time.

with Ranks(2) as ranks:
    one, other = ranks.do(function, argument)  # function(group, argument) on each rank

The function has to stand in a module. What it returns comes back by value; what it raises ends the test.
"""

import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Self

import torch

from rlalign.workers.group import Group

PATIENCE = 150.0


class Ranks:
    def __init__(self, size: int) -> None:
        context = get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        address = Group.address("127.0.0.1")
        self.connections = [here for here, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(there, address, rank, size), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def do(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((function, args)))
        answers = [_answer(connection) for connection in self.connections]
        for _, failure in answers:
            assert failure is None, failure
        return [value for value, _ in answers]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(PATIENCE / 10)
            process.kill()


def _answer(connection: Connection) -> tuple[Any, str | None]:
    assert connection.poll(PATIENCE), "a rank does not answer"
    return pickle.loads(connection.recv_bytes())  # plain pickle: tensors by value, not as shared memory


def _serve(connection: Connection, address: str, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    group = Group.join(address, rank, size, "cpu", timeout=PATIENCE)
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:  # nobody asks any more
            return group.leave()
        try:
            answer = function(group, *args), None
        except Exception:
            answer = None, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
