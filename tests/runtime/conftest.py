"""Clusters that a module's tests share. Such tests carry `pytest.mark.xdist_group("ray")`: one cluster at a time."""

from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from tests.runtime import clusters


@pytest.fixture(scope="module")
def one_node() -> Iterator[Cluster]:
    with clusters.local_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[Cluster]:
    with clusters.three_nodes() as cluster:
        yield cluster


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pytest-xdist 3.8 writes the group into a field that pytest 9.2 does not read (pytest-dev/pytest-xdist#1386)."""
    for item in items:
        grouped = vars(item).get("_nodeid", item.nodeid)
        if grouped != item.nodeid:
            item._id = type(item._id).parse(grouped)
