"""What lies in deploy/prometheus and deploy/grafana: valid, tested by promtool, in step with the code and the runbooks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit import monitoring
from tests.kit.monitoring import DASHBOARDS, GRAFANA, PROMETHEUS, ROOT
from tests.kit.prometheus import require

RUNBOOKS = ROOT / "docs" / "runbooks"
SECTIONS = ["What it means", "What is at risk", "How to look", "What to do", "When it ends"]
ALERTS = {alert["alert"]: alert for alert in monitoring.alerts()}


def _promtool(*arguments: str | Path) -> None:
    command = [require("promtool"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_promtool_accepts_configuration_and_rules() -> None:
    _promtool("check", "config", PROMETHEUS / "prometheus.yml")
    _promtool("check", "rules", *sorted((PROMETHEUS / "rules").glob("*.yml")))


def test_promtool_finds_each_alert_firing_and_quiet_as_it_should() -> None:
    _promtool("test", "rules", *sorted((PROMETHEUS / "tests").glob("*.yml")))


def test_each_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    found: dict[str, set[bool]] = {}
    for file in (PROMETHEUS / "tests").glob("*.yml"):
        for case in yaml.safe_load(file.read_text())["tests"]:
            for check in case["alert_rule_test"]:
                found.setdefault(check["alertname"], set()).add(bool(check["exp_alerts"]))
    assert found == {name: {True, False} for name in ALERTS}


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_it_is_how_bad_and_where_to_read_on(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("page", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbooks/{name}.md"
    page = (RUNBOOKS / f"{name}.md").read_text()
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == SECTIONS
    assert f"Severity: {alert['labels']['severity']}." in page
    row = f"| [{name}]({name}.md) | {alert['labels']['severity']} | {alert.get('for', 'at once')} |"
    assert row in (RUNBOOKS / "README.md").read_text()


def test_there_is_no_runbook_of_an_alert_that_is_gone() -> None:
    assert {page.stem for page in RUNBOOKS.glob("*.md")} == {"README", *ALERTS}


def test_a_page_waits_longer_than_a_daemon_takes_to_restart() -> None:
    quick = [name for name, a in ALERTS.items() if a["labels"]["severity"] == "page" and _seconds(a["for"]) < 120]
    assert not quick


def _seconds(text: str) -> int:
    return int(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


def test_rules_and_panels_ask_only_for_what_the_code_exports() -> None:
    known = monitoring.exported()
    asked = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in monitoring.alerts() + monitoring.records()]
    asked += [(expression.place, expression.text) for expression in monitoring.panel_expressions()]
    unknown = {place: wrong for place, text in asked if (wrong := monitoring.names_in(text) - known)}
    assert not unknown


def test_every_metric_is_shown_or_asked_for_somewhere() -> None:
    texts = [rule["expr"] for rule in monitoring.alerts() + monitoring.records()]
    texts += [expression.text for expression in monitoring.panel_expressions()]
    asked = {name for text in texts for name in monitoring.names_in(text)}
    idle = {name for name in monitoring.exported() if not asked & _forms(name)}
    assert idle == set(), "a metric that nobody looks at is noise: show it or take it out"


def _forms(name: str) -> set[str]:
    bare = re.sub(r"_(sum|count|bucket)$", "", name)
    return {name, bare, *(f"{bare}_{part}" for part in ("sum", "count", "bucket"))}


def test_the_dashboards_are_what_the_generator_writes(tmp_path: Path) -> None:
    pytest.importorskip("grafana_foundation_sdk")
    shutil.copy(GRAFANA / "generate.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "generate.py"], check=True, timeout=60)
    made = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
    assert made == {path.name: path.read_text() for path in DASHBOARDS}, "run `python deploy/grafana/generate.py`"


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_has_a_unit_and_says_what_it_shows_and_nothing_names_a_place(dashboard: Path) -> None:
    text = dashboard.read_text()
    document: dict[str, Any] = json.loads(text)
    for panel in monitoring.panels(dashboard):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["description"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert references == sorted(set(references)), panel["title"]
        assert references, panel["title"]
        assert not any(re.search(r"[{,]\s*job\s*[=!]", target["expr"]) for target in panel["targets"]), panel["title"]
    assert {v["name"] for v in document["templating"]["list"] if v["type"] == "datasource"} == {"datasource"}
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    assert document["uid"] == f"backstay-{dashboard.stem}"
