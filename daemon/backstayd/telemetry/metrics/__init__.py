"""Every metric of the daemons, in one place: what both roles export, a node, the coordinator.

Base units; ``_total`` on counters only; timestamps, not ages; a run is label ``training_job`` (``job/run_id``), and there is
no label per rank, step or peer. Must not look anything up: the code that knows a value sets it.
"""

from backstayd.telemetry.metrics.coordinator import CoordinatorMetrics
from backstayd.telemetry.metrics.daemon import DaemonMetrics
from backstayd.telemetry.metrics.node import NodeMetrics

__all__ = ["CoordinatorMetrics", "DaemonMetrics", "NodeMetrics"]
