"""Fixtures of the cluster tests: real daemons and real trainers as processes."""

from backstay.testing.fixtures import local_cluster, local_cluster_factory

__all__ = ["local_cluster", "local_cluster_factory"]
