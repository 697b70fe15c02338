"""cluster start, stop, status, wait and token: Ray nodes of this machine, in token mode, ended by pid."""

import os
from collections.abc import Sequence
from pathlib import Path

from rlalign.commands.problems import BadInput, in_preparation
from rlalign.runtime import auth
from rlalign.runtime.processes import LOOPBACK, Node, nodes, start_head, start_worker, wait_for_nodes
from rlalign.runtime.processes import stop as end


def start(
    address: str | None,
    port: int | None,
    dashboard_host: str,
    dashboard_port: int | None,
    num_cpus: int | None,
    num_gpus: int | None,
    more: Sequence[str],
) -> int:
    """A head without ``address``, with it a worker of that cluster."""
    given = {"--num-cpus": num_cpus, "--num-gpus": num_gpus}
    resources = [f"{option}={value}" for option, value in given.items() if value is not None]
    with in_preparation():
        if address is None:
            _say_head(start_head(port, dashboard_host, dashboard_port, resources, more), dashboard_host)
        else:
            node = start_worker(address, resources, more)
            print(f"joined        {node.address} (pid {node.pid}, log {node.log})")
            print("to leave      rlalign cluster stop")
    return 0


def _say_head(node: Node, dashboard_host: str) -> None:
    environment = dict(os.environ)
    auth.use_token(environment)
    print(f"head          {node.address} (pid {node.pid}, log {node.log})")
    reach = "from this machine; from another by ssh -L" if dashboard_host in LOOPBACK else f"on {dashboard_host}"
    print(f"dashboard     {node.dashboard} ({reach})")
    print(f"token         {auth.source(environment)}")
    print(f"more machines copy the token there, then: rlalign cluster start --address {node.address}")
    print(f"to run        rlalign submit RUN.yaml --address {node.dashboard} --run-dir DIR")
    print(f"or            rlalign train RUN.yaml runtime=ray --address {node.address}")
    print(f"to stop       rlalign cluster stop --address {node.address}")


def stop(address: str | None, every: bool) -> int:
    """Ends what `start` started on this machine, workers first."""
    with in_preparation():
        here = nodes()
        addresses = sorted({node.address for node in here})
        if address is None and not every and len(addresses) > 1:
            raise BadInput(f"there are clusters {', '.join(addresses)} here; say which: --address HOST:PORT, or --all")
        chosen = [node for node in here if every or address in (None, node.address)]
        for node in sorted(chosen, key=lambda node: node.role == "head"):
            end(node)
            print(f"stopped the {node.role} of {node.address} (pid {node.pid})", flush=True)
        if not chosen:
            print("nothing that was started here is running" + (f" at {address}" if address else ""))
    return 0


def status() -> int:
    """What was started on this machine, and is alive."""
    with in_preparation():
        here = nodes()
        for node in here:
            more = f"  dashboard {node.dashboard}" if node.dashboard else ""
            print(f"{node.role:7} {node.address}  pid {node.pid}{more}")
        if not here:
            print("nothing that was started here is running; to start a cluster: rlalign cluster start")
    return 0


def wait(address: str, count: int, timeout_s: float) -> int:
    """Until so many nodes are alive."""
    with in_preparation():
        wait_for_nodes(address, count, timeout_s)
    print(f"{count} nodes are alive at {address}")
    return 0


def token() -> int:
    """Where the token lies; it is made if there is none."""
    with in_preparation():
        environment = dict(os.environ)
        auth.use_token(environment)
        if not auth.is_on(environment) or environment.get(auth.TOKEN):
            raise BadInput(f"there is no token file: the token comes from {auth.source(environment)}")
        print(Path(auth.source(environment)))
    return 0
