"""Starts a real cluster of daemons on this machine and injects faults: for backstay's tests, the demo, and users' CI."""

from backstay.testing.cluster import LocalCluster
from backstay.testing.daemons import LocalNode
from backstay.testing.wait import DeadlineError, wait_until

__all__ = ["DeadlineError", "LocalCluster", "LocalNode", "wait_until"]
