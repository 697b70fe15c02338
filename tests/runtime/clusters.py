"""Ray clusters on this machine, with GPUs that are only numbers. End them by leaving the block, never by `ray stop`."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import ray
from ray.cluster_utils import Cluster

from rlalign.runtime.auth import use_token

STORE = 80 * 2**20  # bytes; Ray takes no less than 75 MiB

QUICK_DEATH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000}
"""A machine that is killed counts as dead after 5 s; as Ray comes, after 13 to 15."""


@contextmanager
def cluster(**head: Any) -> Iterator[Cluster]:
    """One machine, and this process connected to it; `add_node` and `remove_node` bring and take others."""
    prepare()
    # Sockets lie below, and their paths may have 107 characters.
    temp = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    made = Cluster(shutdown_at_exit=True)
    try:
        # Without a port, Ray looks for a free one, though nothing will listen there.
        made.add_node(**machine(include_dashboard=False, dashboard_port=None, temp_dir=temp, **head))
        ray.init(made.address, log_to_driver=False, logging_level=logging.ERROR)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        shutil.rmtree(temp, ignore_errors=True)


def local_cluster(cpus: int = 8, gpus: int = 0) -> Any:
    """One machine."""
    return cluster(num_cpus=cpus, num_gpus=gpus)


@contextmanager
def three_nodes() -> Iterator[Cluster]:
    """A head without GPUs and two machines with 8 each; labels: pool=head, gpu=a100, gpu=h100."""
    with cluster(num_cpus=8, labels={"pool": "head"}, _system_config=QUICK_DEATH) as made:
        for gpu in ("a100", "h100"):
            made.add_node(**machine(num_cpus=16, num_gpus=8, labels={"gpu": gpu}))
        yield made


def machine(**options: Any) -> dict[str, Any]:
    """For `Cluster.add_node`."""
    return {"object_store_memory": STORE, **options}


@cache
def prepare() -> None:
    """Once per process: a token of its own, and what all clusters and their workers inherit."""
    os.environ |= {
        "RLALIGN_HOME": tempfile.mkdtemp(prefix="rlalign-"),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default to come; Ray 2.50 warns without it
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # Ray's own 15 lets the tests of the other core starve them
        "RAY_prestart_worker_first_driver": "0",  # as many processes as the machine is said to have CPUs
    }
    atexit.register(shutil.rmtree, os.environ["RLALIGN_HOME"], ignore_errors=True)
    use_token()
