"""pytest fixtures around LocalCluster, for a conftest.py: ``from backstay.testing.fixtures import local_cluster``.

The only module of the package that needs pytest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from backstay.testing.cluster import LocalCluster

__all__ = ["LocalClusterFactory", "local_cluster", "local_cluster_factory"]


class LocalClusterFactory(Protocol):
    """Starts a LocalCluster that is closed, and checked for leftovers, when the test ends."""

    def __call__(self, nodes: int = 3, parity: int | str = 1, **options: Any) -> LocalCluster: ...


@pytest.fixture
def local_cluster_factory() -> Iterator[LocalClusterFactory]:
    """Start clusters with any arguments of LocalCluster."""
    clusters: list[LocalCluster] = []

    def make(nodes: int = 3, parity: int | str = 1, **options: Any) -> LocalCluster:
        cluster = LocalCluster(nodes, parity, **options)
        clusters.append(cluster)
        cluster.start()
        return cluster

    yield make
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def local_cluster(local_cluster_factory: LocalClusterFactory) -> LocalCluster:
    """A running cluster of three nodes that survives the loss of one."""
    return local_cluster_factory()
