"""Writes deploy/kubernetes/base and the generated parts of its overlays from the chart, and the chart's copy of the alerts.

So that there is one truth, the chart: ``make manifests`` runs this, and a test compares. Contacts no cluster.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

DEPLOY = Path(__file__).resolve().parents[1]
CHART = DEPLOY / "helm" / "backstay"
NAMESPACE = "backstay"
NOTE = "# Rendered from deploy/helm/backstay by `make manifests`; change it there.\n"
MONITORING = {"podMonitor": {"enabled": True}, "prometheusRule": {"enabled": True}}


def rules() -> str:
    """Recording and alert rules as one document, for the PrometheusRule."""
    groups: list[Any] = []
    for path in sorted((DEPLOY / "prometheus" / "rules").glob("*.yml")):
        groups += yaml.safe_load(path.read_text())["groups"]
    return NOTE.replace("helm/backstay", "prometheus/rules") + yaml.safe_dump(
        {"groups": groups}, sort_keys=False, width=1000
    )


def render(values: dict[str, Any] | None = None) -> dict[str, str]:
    """Text by file name of the chart's templates with ``values``; those that render to nothing are left out."""
    with Chart.load(CHART) as chart:
        chart.validate_schema(values or {})
        rendered = chart.render(values or {}, name="backstay", namespace=NAMESPACE)
    texts = {Path(path).name: text.strip("\n-") + "\n" for path, text in rendered.items()}
    return {name: text for name, text in texts.items() if text.strip()}


def kustomization(names: list[str]) -> str:
    document = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": ["namespace.yaml", *names],
    }
    return NOTE + yaml.safe_dump(document, sort_keys=False)


def files() -> dict[Path, str]:
    """Everything that is generated, by path."""
    base = render()
    folder = DEPLOY / "kubernetes"
    found = {folder / "base" / name: NOTE + text for name, text in base.items()}
    found[folder / "base" / "kustomization.yaml"] = kustomization(sorted(base))
    monitoring = render(MONITORING)["monitoring.yaml"]
    found[folder / "overlays" / "prometheus-operator" / "monitoring.yaml"] = NOTE + monitoring
    return found


def main() -> int:
    (CHART / "files").mkdir(exist_ok=True)
    (CHART / "files" / "rules.yaml").write_text(rules())
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
