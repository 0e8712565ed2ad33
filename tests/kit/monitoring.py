"""Rules and dashboards as data: every expression in deploy/prometheus and deploy/grafana, and the names they use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from backstayd.telemetry.metrics import CoordinatorMetrics, NodeMetrics
from backstayd.telemetry.metrics.registry import Declared

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
GRAFANA = ROOT / "deploy" / "grafana"
DASHBOARDS = sorted(GRAFANA.glob("*.json"))


@dataclass(frozen=True)
class Expression:
    """``place`` names it for people: file, panel or rule."""

    place: str
    text: str


def rules(file: str) -> list[dict[str, Any]]:
    document = yaml.safe_load((PROMETHEUS / "rules" / file).read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return rules("backstay.alerts.yml")


def records() -> list[dict[str, Any]]:
    return rules("backstay.rules.yml")


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """All panels that are not rows."""
    found = json.loads(dashboard.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def panel_expressions() -> Iterator[Expression]:
    """With Grafana's variables as it would fill them in for everything that is there."""
    for dashboard in DASHBOARDS:
        for panel in panels(dashboard):
            for target in panel["targets"]:
                text = re.sub(r"\$__rate_interval|\$__range", "1m", target["expr"])
                text = re.sub(r"\$(training_job|instance)\b", ".*", text)
                assert "$" not in text, f"{dashboard.stem} / {panel['title']}: {text}"
                yield Expression(f"{dashboard.stem} / {panel['title']} / {target['legendFormat']}", text)


def series_names(declared: Declared) -> Iterator[str]:
    """The names of the series that queries may use."""
    yield declared.name
    if declared.kind in ("histogram", "summary"):
        yield f"{declared.name}_sum"
        yield f"{declared.name}_count"
    if declared.kind == "histogram":
        yield f"{declared.name}_bucket"


def exported() -> set[str]:
    """Every name that a query may use: what the code exports, what the rules record, and what Prometheus adds."""
    declared = [*NodeMetrics(version="0").declared, *CoordinatorMetrics(version="0").declared]
    process = {
        "process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "process_max_fds",
        "process_start_time_seconds",
    }  # fmt: skip
    names = {name for metric in declared for name in series_names(metric)}
    return names | process | {rule["record"] for rule in records()} | {"up"}


def names_in(expression: str) -> set[str]:
    """The metrics that ``expression`` asks for."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    return set(re.findall(r"\b(?:[a-z_]+:)?(?:backstay|process)_[a-z0-9_]+(?::[a-z0-9_]+)?|\bup\b", bare))
