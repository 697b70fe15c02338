"""A connection to Ray and the pools of one run on it."""

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray

from rlalign.runtime import wire
from rlalign.runtime.auth import source, use_token
from rlalign.runtime.config import RuntimeConfig
from rlalign.runtime.engine import Engine
from rlalign.runtime.host import GIB, Setup
from rlalign.runtime.placement import Placement
from rlalign.runtime.pool import LearnersLost
from rlalign.runtime.processes import answers, private_folder
from rlalign.runtime.ray import RayPool
from rlalign.runtime.spares import Spares
from rlalign.runtime.worker import Worker

logger = logging.getLogger(__name__)

KEPT_SESSIONS = 10


class RayRuntime:
    """Connects, reserves machines, and starts workers; ValueError, one sentence, when that cannot be."""

    def __init__(self, config: RuntimeConfig, seed: int = 0) -> None:
        """``seed``: of the run, for messages."""
        self.config, self.seed = config, seed
        self.spares: Spares | None = None
        self.pools: list[RayPool] = []
        self.connected = not ray.is_initialized()
        if self.connected:
            connect(config)
        try:
            wire.register()
            self.placement = Placement(config)
            self.placement.reserve(join_s=config.join_timeout_s)
        except BaseException:
            self._disconnect()
            raise
        self.engine = Engine(config.in_flight_gib * GIB)

    def keep_spares(self, warm: Callable[[], None]) -> None:
        """For the workers of all pools made after this call; ``warm`` imports what they need."""
        if self.config.spares:
            self.spares = Spares(warm)

    def pool(self, role: str, make: Callable[..., Any], count: int, memory_gib: float | None = None) -> RayPool:
        """Workers that can be replaced one by one."""
        return self._pool(role, make, count, None, memory_gib)

    def group(self, role: str, make: Callable[..., Any], count: int, address: Callable[[], str]) -> RayPool:
        """Workers that are one torch.distributed group: ``make(rank, size, address)``, the address told by rank 0."""

        def ranks(workers: list[Worker]) -> list[tuple[Any, ...]]:
            where = workers[0].actor.run.remote(address) if count > 1 else ""  # Ray hands its value to their setups
            return [(rank, count, where) for rank in range(count)]

        return self._pool(role, make, count, ranks, None)

    @property
    def uploaded(self) -> bool:
        """Whether this is a job whose folder was copied to every machine, each time to a place of its own."""
        return bool(ray.get_runtime_context().runtime_env.get("working_dir"))

    def wait_until_up(self) -> None:
        """All that have a place are up; what one of them complains of is raised here.

        Later, one that complains at its start counts as dead.
        """
        for left in reversed(range(self.config.restarts + 1)):
            try:
                self.engine.wait(lambda: all(pool.settled for pool in self.pools), lambda start, end: None)
                break
            except LearnersLost:
                if not left:
                    raise
                self.recover()
        for pool in self.pools:
            pool.begun = True

    def members(self) -> list[dict[str, Any]]:
        return [member for pool in self.pools for member in pool.members()]

    def follow(self, logs: Path, changed: Callable[[], None]) -> None:
        self.engine.changed = changed
        for pool in self.pools:
            pool.log_to(logs.absolute())

    def recover(self) -> None:
        for pool in self.pools:
            if pool.together is None:
                pool.forget()
            else:
                pool.restart()

    def close(self) -> None:
        self.engine.changed = lambda: None
        for pool in self.pools:
            pool.close()
        if self.spares is not None:
            self.spares.close()
        self.placement.release()
        self._disconnect()

    def _pool(self, role: str, make: Any, count: int, together: Any, memory_gib: float | None) -> RayPool:
        threads = self.config.threads_per_worker
        gpus = self.placement.gpus(role)
        setups = [Setup(f"{role}-{index}", make, threads, gpus, memory_gib) for index in range(count)]
        spares = self.spares if together is None and gpus == 0 else None
        pool = RayPool(self.engine, self.placement, self.config, role, setups, together, spares, self.seed)
        self.pools.append(pool)
        return pool

    def _disconnect(self) -> None:
        if self.connected:
            ray.shutdown()


def connect(config: RuntimeConfig) -> None:
    """To the cluster that is named, in the run file or by RAY_ADDRESS as in a Ray job, or else to one of our own."""
    use_token()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with own_signal_handlers():
        if address is None:
            os.environ.setdefault("RAY_worker_niceness", "0")  # else anything else here starves them
            cpus = max(os.cpu_count() or 1, round(cpus_wanted(config) + 0.5))
            folder = private_folder("own")
            sweep(folder)
            ray.init("local", num_cpus=cpus, include_dashboard=False, _temp_dir=str(folder), **quiet)
            return
        _require_somebody(address)
        try:
            ray.init(address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            words = " ".join(str(error).split())[:200]
            secret = f"the token in use is {source()}"
            raise ValueError(f"cannot connect to the Ray cluster {address}; {secret}: {words}") from error


def sweep(folder: Path) -> None:
    """Removes what Ray left there of earlier runs, but for the newest ones' logs; no run that still goes on."""
    sessions = sorted(path for path in folder.glob("session_*_*") if not path.is_symlink())  # named by date and pid
    for path in sessions[:-KEPT_SESSIONS]:
        if not psutil.pid_exists(int(path.name.rpartition("_")[2])):
            shutil.rmtree(path, ignore_errors=True)


def _require_somebody(address: str) -> None:
    """Ray itself would try for more than a minute."""
    _, colon, port = address.rpartition(":")
    if colon and "://" not in address and not (port.isdigit() and answers(address)):
        raise ValueError(
            f"no Ray cluster answers at {address}; give runtime.address as `rlalign cluster start` printed it, or"
            " leave it out for a cluster on this machine alone"
        )


def cpus_wanted(config: RuntimeConfig) -> float:
    """So many that a cluster of our own, on one machine, has room for all workers: they share its cores."""
    return config.cpus_per_worker * (config.samplers + config.scorers + config.learners)


@contextmanager
def own_signal_handlers() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM by its own, which leaves no checkpoint."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
