"""Start a real cluster of daemons on this machine and break it: for backstay's own tests, the demo, and a user's CI."""

from backstay.testing.cluster import LocalCluster
from backstay.testing.daemons import LocalNode
from backstay.testing.wait import DeadlineError, wait_until

__all__ = ["DeadlineError", "LocalCluster", "LocalNode", "wait_until"]
