"""The reference of every metric, docs/metrics.md, made from their declarations. ``python -m`` this module prints it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from backstayd.telemetry.metrics.coordinator import CoordinatorMetrics
from backstayd.telemetry.metrics.daemon import DaemonMetrics
from backstayd.telemetry.metrics.node import NodeMetrics
from backstayd.telemetry.metrics.registry import MAX_RUNS, RUN_LABEL, Declared

HEAD = """\
# Metrics

Every daemon serves these on `/metrics` of its HTTP port, without a label for the machine: the scrape adds `instance`.
`{run}` is `job/run_id`; a run has its series from the first sight of it until its memory is freed, and at most {most} runs have
any. Label values in the table are exported at 0 before anything happened; `…` marks a label whose values are not known ahead.
`process_*` is about the daemon's own process, without its coders.

How they are put to use: [alerts and their runbooks](runbooks/README.md), `deploy/prometheus`, `deploy/grafana`. Why these
and not others: [decision 0022](decisions/0022-metrics-and-alerts.md).

This page is made from the code: `python -m backstayd.telemetry.metrics.reference > docs/metrics.md`.
"""


def reference() -> str:
    """The page."""
    roles = (NodeMetrics(version="0"), CoordinatorMetrics(version="0"))
    shared = {d.name for d in DaemonMetrics(role="", version="0").declared}
    parts = [HEAD.format(run=RUN_LABEL, most=MAX_RUNS)]
    parts.append(_table("Every daemon", [d for d in roles[0].declared if d.name in shared]))
    parts.append(_table("Node", [d for d in roles[0].declared if d.name not in shared]))
    parts.append(_table("Coordinator", [d for d in roles[1].declared if d.name not in shared]))
    return "\n".join(parts)


def _table(title: str, metrics: Iterable[Declared]) -> str:
    rows = [f"| `{d.name}` | {d.kind} | {_labels(d)} | {d.documentation} |" for d in metrics]
    return "\n".join([f"## {title}", "", "| name | kind | labels | is |", "| --- | --- | --- | --- |", *rows, ""])


def _labels(declared: Declared) -> str:
    found = []
    for label, values in declared.labels.items():
        found.append(f"`{label}`" if label == RUN_LABEL else f"`{label}`: {', '.join(values) or '…'}")
    return "; ".join(found)


if __name__ == "__main__":
    sys.stdout.write(reference())
