"""Ray processes of this machine: started here, written down with pid and start time, and ended by exactly these.

Never by `ray stop`, which ends what looks like Ray, whosever cluster it is. One `ray start --block` is the parent of
all that belongs to its node: on SIGTERM it drains the node and takes its children along.
"""

import json
import logging
import os
import platform
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import psutil

from rlalign.runtime import auth

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STARTED = "Ray runtime started."
START_TIMEOUT_S, STOP_TIMEOUT_S, KILL_TIMEOUT_S = 90.0, 30.0, 10.0
DRAIN_S = 5  # Ray waits so long for work that nobody here moves elsewhere; 30 unless set
GCS_PORT, DASHBOARD_PORT, AGENT_PORT, CLIENT_PORT = 6379, 8265, 52365, 10001  # Ray's own
OWN_OPTIONS = ("--head", "--block", "--address", "--port", "--dashboard-host", "--dashboard-port", "--temp-dir")


@dataclass(frozen=True, slots=True)
class Node:
    """One Ray node that was started here. ``dashboard`` only of a head."""

    role: Literal["head", "worker"]
    address: str
    dashboard: str | None
    pid: int
    created: float
    host: str
    log: str

    @property
    def record(self) -> Path:
        return _records() / f"{self.host}-{self.pid}.json"

    def processes(self) -> list[psutil.Process]:
        """The parent and all that descends from it, also what outlived it; [] once another process has its pid.

        The parent leads a session, whose number no process gets as its pid as long as one of the session lives.
        """
        try:
            parent = psutil.Process(self.pid)
            if abs(parent.create_time() - self.created) > 1.0 or parent.status() == psutil.STATUS_ZOMBIE:
                return []
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return [process for process in psutil.process_iter() if _session(process.pid) == self.pid]


def nodes() -> list[Node]:
    """Those started here that still live; records of others of this machine are removed."""
    found: list[Node] = []
    for path in sorted(_records().glob(f"{platform.node()}-*.json")):
        try:
            node = Node(**json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            path.unlink(missing_ok=True)
            continue
        if node.processes():
            found.append(node)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda node: (node.address, node.role, node.pid))


def start_head(
    port: int | None, dashboard_host: str, dashboard_port: int | None, resources: Sequence[str], more: Sequence[str]
) -> Node:
    """A new cluster with this machine as its head. Ports that are not given are Ray's own, or free ones near by."""
    environment = _environment()
    if dashboard_host not in LOOPBACK and not auth.is_on(environment):
        raise ValueError(
            f"a dashboard on {dashboard_host} without a token lets everyone there run code as you; "
            f"unset {auth.MODE}, or leave the dashboard on 127.0.0.1 and reach it by ssh -L"
        )
    gcs = _port("--port", port, GCS_PORT)
    dashboard = _port("--dashboard-port", dashboard_port, DASHBOARD_PORT)
    own = ["--head", f"--port={gcs}", f"--dashboard-host={dashboard_host}", f"--dashboard-port={dashboard}"]
    own += [f"--ray-client-server-port={_port('', None, CLIENT_PORT)}"]
    log, process = _start([*own, *_on_every_node(gcs, resources, more)], f"head-{gcs}", environment)
    with _ended_if_not(process):
        _wait_until_started(process, log)
        address = (private_folder(str(gcs)) / "ray_current_cluster").read_text().strip()
        shown = "127.0.0.1" if dashboard_host in ("0.0.0.0", "::") else dashboard_host
        return _written_down("head", address, f"http://{shown}:{dashboard}", process, log)


def start_worker(address: str, resources: Sequence[str], more: Sequence[str]) -> Node:
    """This machine joins the cluster whose head is at ``address``, host:port."""
    _, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"{address!r} is no address of a cluster's head; it looks like 10.0.0.5:{GCS_PORT}")
    if not answers(address):
        raise ValueError(f"no Ray cluster answers at {address}; the head prints the address when it starts")
    own = [f"--address={address}", *_on_every_node(int(port), resources, more)]
    log, process = _start(own, f"worker-{port}", _environment())
    with _ended_if_not(process):
        _wait_until_started(process, log)
        return _written_down("worker", address, None, process, log)


def stop(node: Node) -> None:
    """Ends the node and all that descends from it, and nothing else."""
    _end(node.processes())
    node.record.unlink(missing_ok=True)


def wait_for_nodes(address: str, count: int, timeout_s: float) -> None:
    """Until ``count`` nodes of the cluster are alive; ValueError when that takes too long."""
    auth.use_token()
    import ray  # after the token mode, which it reads on import

    deadline = time.monotonic() + timeout_s
    while not answers(address):
        if time.monotonic() > deadline:
            raise ValueError(f"no Ray cluster answers at {address} after {timeout_s:.0f} s")
        time.sleep(1.0)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        raise ValueError(f"the cluster at {address} refuses the token from {auth.source()}") from None
    try:
        while (alive := sum(node["Alive"] for node in ray.nodes())) < count:
            if time.monotonic() > deadline:
                raise ValueError(f"only {alive} of {count} nodes are alive at {address} after {timeout_s:.0f} s")
            time.sleep(1.0)
    finally:
        ray.shutdown()


# --- starting


def _environment() -> dict[str, str]:
    """Of a node and of all that it will run: token mode, and `python` and `rlalign` are those of this environment."""
    environment = (
        {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S)} | os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    )
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment.pop("RAY_ADDRESS", None)  # of another cluster
    auth.use_token(environment)
    return environment


def _on_every_node(gcs_port: int, resources: Sequence[str], more: Sequence[str]) -> list[str]:
    for option in more:
        if option.split("=")[0] in OWN_OPTIONS:
            raise ValueError(
                f"{option.split('=')[0]} cannot be handed through to Ray; see rlalign cluster start --help"
            )
    agent = _port("", None, AGENT_PORT)
    return [f"--temp-dir={private_folder(str(gcs_port))}", f"--dashboard-agent-listen-port={agent}", *resources, *more]


def private_folder(name: str) -> Path:
    """The same path on every node, since paths below it travel; closed to other users, since Ray opens its own to all.

    In /tmp whatever TMPDIR says: sockets lie there, whose paths may have 107 characters.
    """
    private = Path(f"/tmp/rlalign-{os.getuid()}")
    private.mkdir(mode=0o700, exist_ok=True)
    state = private.lstat()
    if private.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise ValueError(f"{private} is not a folder that only you can enter; remove it, it is made anew")
    folder = private / name
    folder.mkdir(exist_ok=True)
    return folder


def _start(options: Sequence[str], name: str, environment: dict[str, str]) -> tuple[Path, "subprocess.Popen[bytes]"]:
    folder = _records()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = folder / f"{platform.node()}-{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--log-color=false", *options]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    return log, process


def _wait_until_started(process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while STARTED not in (words := log.read_text(errors="replace")):
        if "Unauthenticated" in words or "AuthenticationError" in words:
            raise ValueError(f"the cluster refuses the token from {auth.source(_environment())}; copy the head's here")
        if process.poll() is not None:
            last = next((line for line in reversed(words.splitlines()) if line.strip()), "it printed nothing")
            raise ValueError(f"Ray did not start: {last.strip()[:200]} (all of it in {log})")
        if time.monotonic() > deadline:
            raise ValueError(f"Ray was not up after {START_TIMEOUT_S:.0f} s; see {log}")
        time.sleep(0.1)


@contextmanager
def _ended_if_not(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """What failed to start, or was interrupted while it did, leaves nothing behind."""
    try:
        yield
    except BaseException:
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(process.pid)
            _end([parent, *parent.children(recursive=True)])
        raise


def _written_down(
    role: Literal["head", "worker"], address: str, dashboard: str | None, process: "subprocess.Popen[bytes]", log: Path
) -> Node:
    created = psutil.Process(process.pid).create_time()
    node = Node(role, address, dashboard, process.pid, created, platform.node(), str(log))
    node.record.write_text(json.dumps(asdict(node)))
    return node


def _records() -> Path:
    return auth.home() / "nodes"  # may lie on storage that machines share, hence the host in every name


# --- ending


def _end(family: Sequence[psutil.Process]) -> None:
    """The first is asked and takes the others along; who is left after that is killed.

    A pid that was given away meanwhile is never hit: psutil compares start times before it sends a signal.
    """
    if not family:
        return
    everybody = {*family}
    with suppress(psutil.NoSuchProcess):
        family[0].terminate()
        psutil.wait_procs(family[:1], STOP_TIMEOUT_S)
        everybody |= {*family[0].children(recursive=True)}
    # Such as a job's driver, which has a session of its own.
    _, left = psutil.wait_procs(everybody, 1.0)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, KILL_TIMEOUT_S)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:  # gone, or another user's
        return None


# --- ports


def _port(option: str, wanted: int | None, default: int) -> int:
    """The wanted port, or the default one, or any free one where another cluster has that."""
    if wanted:
        if not _free(wanted):
            raise ValueError(f"port {wanted} is in use; choose another {option}, or 0 for any")
        return wanted
    return default if wanted is None and _free(default) else _any_free()


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _any_free() -> int:
    """Drawn from where neither Ray's workers nor outgoing connections take theirs: so it is free a moment later too."""
    return next(port for port in iter(partial(random.randint, 20_000, 32_000), None) if _free(port))


def answers(address: str) -> bool:
    """Whether anybody listens at this "host:port"."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), 5.0):
            return True
    except OSError:
        return False
