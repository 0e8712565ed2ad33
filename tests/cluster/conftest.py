"""Fixtures of the cluster tests: real daemons and real trainers as processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backstay.testing import LocalCluster
from backstay.testing.fixtures import local_cluster_factory as new_cluster

__all__ = ["new_cluster"]


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[LocalCluster]:
    """One cluster for all tests of a file, of the arguments in its ``CLUSTER``."""
    with LocalCluster(**request.module.CLUSTER) as running:
        yield running
