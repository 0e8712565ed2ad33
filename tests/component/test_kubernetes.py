"""The manifests as far as they can be judged without a cluster: schemas, policies, and that they agree with the code."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python import Chart, HelmValuesError, lint

from backstayd import addresses, units
from backstayd.config.load import load_config
from backstayd.config.schema import CoordinatorConfig, NodeConfig

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "backstay"
FOLDER = ROOT / "deploy" / "kubernetes"
KUBERNETES_VERSIONS = ("1.35", "1.36", "1.37")
OURS_ALONE = {"PodMonitor", "PrometheusRule"}  # resource definitions of the Prometheus operator: no schema here
KUSTOMIZED = ("base", "overlays/unprepared-nodes", "overlays/prometheus-operator")

Document = dict[str, Any]


def documents(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document]


def kustomized(name: str) -> list[Document]:
    program = shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([program, "kustomize", str(FOLDER / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def rendered(values: Document | None = None) -> list[Document]:
    with Chart.load(CHART) as chart:
        chart.validate_schema(values or {})
        texts = chart.render(values or {}, name="backstay", namespace="backstay").values()
    return [document for text in texts for document in documents(text)]


def one(found: list[Document], kind: str, name: str = "") -> Document:
    matching = [d for d in found if d["kind"] == kind and name in ("", d["metadata"]["name"])]
    assert len(matching) == 1, f"{len(matching)} documents of kind {kind} {name}"
    return matching[0]


def pod(document: Document) -> Document:
    return dict(document["spec"]["template"]["spec"])


def configuration(found: list[Document], path: Path) -> Path:
    """The chart's backstayd.toml as a file in ``path``."""
    file = path / "backstayd.toml"
    file.write_text(one(found, "ConfigMap")["data"]["backstayd.toml"])
    return file


def by_name(found: list[Document]) -> dict[tuple[str, str], Document]:
    return {(document["kind"], document["metadata"]["name"]): document for document in found}


def environment(document: Document, **fields: str) -> dict[str, str]:
    """The container's environment as the kubelet would make it, with ``fields`` for what it knows."""
    found: dict[str, str] = {}
    for entry in pod(document)["containers"][0]["env"]:
        value = entry.get("value") or fields[entry["name"]]
        found[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda match: found[match[1]], value)
    return found


def gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity[:-2])


# -- one truth ---------------------------------------------------------------------------------------------------------


def test_the_manifests_are_the_chart_rendered() -> None:
    made = runpy.run_path(str(FOLDER / "render.py"))
    for path, text in made["files"]().items():
        assert path.read_text() == text, f"{path} is old: make manifests"
    rules = CHART / "files" / "rules.yaml"
    assert rules.read_text() == made["rules"](), f"{rules} is old: make manifests"


def test_the_overlay_for_unprepared_nodes_is_the_chart_with_memory_of_the_pod() -> None:
    overlay = by_name(kustomized("overlays/unprepared-nodes"))
    namespace = overlay.pop(("Namespace", "backstay"))
    assert namespace["metadata"]["name"] == "backstay"
    assert overlay == by_name(rendered({"node": {"memorySource": "emptyDir"}}))


def test_the_chart_has_no_error() -> None:
    found = lint(str(CHART))
    assert found["errors"] == []
    # severity 1 is information: a chart should have an icon
    assert [message for message in found["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize(
    "values",
    [
        {"node": {"memroy": "64Gi"}},
        {"node": {"memory": "64GB"}},
        {"node": {"maxUnavailable": "50%"}},
        {"coordinator": {"parity": "5"}},
        {"image": {"digest": "latest"}},
        {"node": {"settings": {"http": "[::]:8080"}}},
        {"node": {"settings": {"http_tls": "yes"}}},
        {"coordinator": {"settings": {"keep": [2]}}},
    ],
    ids=json.dumps,
)
def test_a_value_that_means_nothing_is_refused(values: Document) -> None:
    with pytest.raises(HelmValuesError):
        rendered(values)


# -- schemas and policies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KUSTOMIZED)
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_document_is_valid(name: str, version: str) -> None:
    for document in kustomized(name):
        if document["kind"] not in OURS_ALONE:
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_the_example_job_is_valid(version: str) -> None:
    for document in documents((FOLDER / "examples" / "training-job.yaml").read_text()):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_misspelt_key_would_be_found() -> None:
    document = one(rendered(), "DaemonSet")
    pod(document)["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES_VERSIONS[-1], strict=True)


def test_checkov_finds_nothing_but_what_is_passed_over_with_a_reason(tmp_path: Path) -> None:
    program = shutil.which("checkov", path=f"{ROOT / '.venv-checkov' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("checkov is not installed; `make checkov` puts it into .venv-checkov (290 MB)")
    arguments = [program, "--config-file", str(FOLDER / "checkov.yaml"), "--skip-download", "--quiet", "-o", "json"]
    for name in ("base", "overlays/unprepared-nodes"):
        path = tmp_path / f"{name.rpartition('/')[2]}.yaml"
        path.write_text(yaml.safe_dump_all(kustomized(name)))
        arguments += ["-f", str(path)]
    arguments += ["-f", str(ROOT / "deploy" / "docker" / "Dockerfile")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=tmp_path)
    reports = json.loads(done.stdout)
    assert {report["check_type"] for report in reports} == {"kubernetes", "dockerfile"}, done.stderr
    for report in reports:
        failed = [(c["check_id"], c["check_name"], c["resource"]) for c in report["results"]["failed_checks"]]
        assert failed == []
        assert report["summary"]["passed"] > 40


# -- what the schemas cannot know --------------------------------------------------------------------------------------


def test_nothing_is_privileged() -> None:
    for values in ({}, {"node": {"memorySource": "emptyDir"}}):
        for document in rendered(values):
            if document["kind"] not in ("DaemonSet", "Deployment"):
                continue
            spec = pod(document)
            assert not spec.get("hostNetwork")
            assert not spec.get("hostIPC")
            assert spec["securityContext"]["runAsNonRoot"] is True
            for container in [*spec["containers"], *spec.get("initContainers", ())]:
                security = container["securityContext"]
                assert not security.get("privileged")
                assert security["allowPrivilegeEscalation"] is False
                assert security["readOnlyRootFilesystem"] is True
                assert security["capabilities"]["drop"] == ["ALL"]
            assert all(not c["securityContext"]["capabilities"].get("add") for c in spec["containers"])


def test_the_memory_that_is_asked_for_holds_what_the_daemon_may_hold() -> None:
    for memory, overhead in (("64Gi", "1Gi"), ("200Gi", "4Gi")):
        found = rendered({"node": {"memory": memory, "overheadMemory": overhead}})
        resources = pod(one(found, "DaemonSet"))["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"], "guaranteed: the last to be killed for memory"
        settings = tomllib.loads(one(found, "ConfigMap")["data"]["backstayd.toml"])["node"]
        quota = units.parse_size(settings["quota_bytes"])
        assert quota == gibibytes(memory) << 30
        assert gibibytes(resources["limits"]["memory"]) << 30 == quota + (gibibytes(overhead) << 30)


def test_memory_of_the_pod_is_as_large_as_the_quota() -> None:
    found = rendered({"node": {"memorySource": "emptyDir", "memory": "16Gi"}})
    volumes = {volume["name"]: volume for volume in pod(one(found, "DaemonSet"))["volumes"]}
    assert volumes["memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}


def test_the_daemon_takes_the_configuration_that_it_is_given(tmp_path: Path) -> None:
    found = rendered()
    file = configuration(found, tmp_path)
    daemons = one(found, "DaemonSet")
    environ = environment(daemons, NODE_NAME="worker-7", POD_IP="10.0.0.7")
    node = load_config(NodeConfig, file=file, environ=environ, flags={})
    assert (node.name, node.bulk, str(node.tls_cert)) == ("worker-7", "10.0.0.7:7071", "/tls/worker-7.crt")
    environ = environment(one(found, "Deployment"), POD_IP="10.0.0.8")
    coordinator = load_config(CoordinatorConfig, file=file, environ=environ, flags={})
    assert coordinator.advertise == "10.0.0.8:7070"
    assert not node.insecure
    assert not coordinator.insecure
    roles = [one(found, "Role")["rules"][1], one(found, "ClusterRole")["rules"][0]]
    assert coordinator.election == f"kubernetes://backstay/{roles[0]['resourceNames'][0]}"
    assert roles[1]["verbs"] == ["get"]
    assert node.kubernetes_node == "worker-7"


def test_settings_of_the_chart_reach_the_daemons(tmp_path: Path) -> None:
    bandwidth = {"persist_bandwidth_bytes_per_s": 100_000_000}
    values = {"coordinator": {"settings": {"keep": 2} | bandwidth, "parity": "2"}}
    file = configuration(rendered(values), tmp_path)
    coordinator = load_config(CoordinatorConfig, file=file, environ={}, flags={})
    assert (coordinator.keep, coordinator.parity) == (2, 2)
    assert coordinator.persist_bandwidth_bytes_per_s == 100_000_000


def test_settings_win_over_what_the_chart_would_write_even_when_they_say_none(tmp_path: Path) -> None:
    parts = {
        "node": {"lease_s": 0.5, "coders": 3, "log_format": "text", "http": "[::]:7072"},
        "coordinator": {"parity": 0, "group_size": 4, "persist_url": "", "listen": "[::]:7070", "http": "[::]:7073"},
    }
    values: Document = {name: {"settings": settings} for name, settings in parts.items()}
    values["coordinator"]["persistUrl"] = "s3://bucket"
    found = rendered(values)
    file = configuration(found, tmp_path)
    written = tomllib.loads(file.read_text())
    assert {name: {key: written[name][key] for key in settings} for name, settings in parts.items()} == parts
    environ = environment(one(found, "DaemonSet"), NODE_NAME="worker-7", POD_IP="fd00::7")
    node = load_config(NodeConfig, file=file, environ=environ, flags={})
    assert (node.http, node.bulk) == ("[::]:7072", "[fd00::7]:7071")
    environ = environment(one(found, "Deployment"), POD_IP="fd00::8")
    coordinator = load_config(CoordinatorConfig, file=file, environ=environ, flags={})
    assert (coordinator.listen, coordinator.http, coordinator.advertise) == ("[::]:7070", "[::]:7073", "[fd00::8]:7070")
    assert coordinator.parity == 0


def test_a_large_user_id_stays_a_whole_number() -> None:
    found = rendered({"node": {"userID": 1_000_660_000, "memorySource": "emptyDir"}})
    for kind in ("DaemonSet", "Deployment"):
        document = one(found, kind)
        kubernetes_validate.validate(document, KUBERNETES_VERSIONS[-1], strict=True)
        assert pod(document)["securityContext"]["fsGroup"] == 1_000_660_000
    assert "1000660000" in pod(one(found, "DaemonSet"))["initContainers"][0]["command"]


def test_ports_are_those_of_the_configuration() -> None:
    found = rendered()
    settings = tomllib.loads(one(found, "ConfigMap")["data"]["backstayd.toml"])
    for kind, section in (("DaemonSet", "node"), ("Deployment", "coordinator")):
        ports = {port["name"]: port["containerPort"] for port in pod(one(found, kind))["containers"][0]["ports"]}
        assert ports["http"] == addresses.split_address(settings[section]["http"])[1]
    grpc = one(found, "Service", "backstay-coordinator")["spec"]["ports"][0]
    assert settings["node"]["coordinator"] == f"backstay-coordinator.backstay.svc:{grpc['port']}"
    assert grpc["port"] == addresses.split_address(settings["coordinator"]["listen"])[1]
    daemons = one(found, "DaemonSet")
    bulk = environment(daemons, NODE_NAME="n", POD_IP="10.0.0.1")["BACKSTAYD_NODE_BULK"]
    ports = {port["name"]: port["containerPort"] for port in pod(daemons)["containers"][0]["ports"]}
    assert addresses.split_address(bulk)[1] == ports["bulk"]


def test_every_named_port_exists() -> None:
    found = rendered({"podMonitor": {"enabled": True}})
    ports = {
        component: {port["name"] for port in pod(one(found, kind))["containers"][0]["ports"]}
        for kind, component in (("DaemonSet", "node"), ("Deployment", "coordinator"))
    }
    for document in found:
        if document["kind"] == "Service":
            component = document["spec"]["selector"]["app.kubernetes.io/component"]
            assert {port["targetPort"] for port in document["spec"]["ports"]} <= ports[component]
            assert document["spec"]["clusterIP"] == "None"
            assert document["spec"]["publishNotReadyAddresses"] is True
        if document["kind"] == "NetworkPolicy":
            component = document["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
            opened = {port["port"] for rule in document["spec"]["ingress"] for port in rule["ports"]}
            assert opened <= ports[component]
        if document["kind"] == "PodMonitor":
            assert {endpoint["port"] for endpoint in document["spec"]["podMetricsEndpoints"]} <= set.intersection(
                *ports.values()
            )


def test_probes_ask_what_the_daemons_answer_and_are_slow_to_kill() -> None:
    source = (ROOT / "daemon" / "backstayd" / "telemetry" / "routes.py").read_text()
    for kind in ("DaemonSet", "Deployment"):
        container = pod(one(rendered(), kind))["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert f'"{container[probe]["httpGet"]["path"]}"' in source
        liveness = container["livenessProbe"]
        assert liveness["httpGet"]["path"] == "/livez"
        assert liveness["failureThreshold"] * liveness["periodSeconds"] >= 60


@pytest.mark.parametrize("secure", ["node", "coordinator"])
def test_pages_over_tls_are_asked_for_over_tls_and_the_others_are_not(secure: str) -> None:
    found = rendered({secure: {"settings": {"http_tls": True}}, "podMonitor": {"enabled": True}})
    for kind, component in (("DaemonSet", "node"), ("Deployment", "coordinator")):
        scheme = "HTTPS" if component == secure else "HTTP"
        container = pod(one(found, kind))["containers"][0]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["scheme"] == scheme
        service = {port["name"]: port for port in one(found, "Service", f"backstay-{component}")["spec"]["ports"]}
        assert service["http"]["appProtocol"] == scheme.lower()
        endpoint = one(found, "PodMonitor", f"backstay-{component}")["spec"]["podMetricsEndpoints"][0]
        assert endpoint["scheme"] == scheme.lower()
        assert endpoint.get("tlsConfig") == ({"insecureSkipVerify": True} if component == secure else None)


def test_a_scrape_adds_no_label_by_which_rules_would_judge_each_machine_alone_and_is_known_by_name() -> None:
    alerts = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules" / "backstay.alerts.yml").read_text())
    down = next(rule["expr"] for rule in alerts["groups"][0]["rules"] if rule["alert"] == "DaemonDown")
    names = re.findall(r'job=~"(.+?)"', down)
    assert len(names) == 1
    monitors = [d for d in rendered({"podMonitor": {"enabled": True}}) if d["kind"] == "PodMonitor"]
    assert len(monitors) == 2
    for monitor in monitors:
        job = f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}"  # as the operator calls it
        assert re.fullmatch(names[0], job)
        assert not {"relabelings", "metricRelabelings"} & monitor["spec"]["podMetricsEndpoints"][0].keys()
        assert not {"podTargetLabels", "attachMetadata"} & monitor["spec"].keys()
    static = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert all(re.fullmatch(names[0], scrape["job_name"]) for scrape in static)


def test_a_rollout_takes_fewer_daemons_away_than_a_group_survives() -> None:
    update = one(rendered(), "DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"]
    assert update == {"maxUnavailable": 1, "maxSurge": 0}


def test_disruption_budgets_are_of_the_form_that_works() -> None:
    found = rendered()
    daemons = one(found, "DaemonSet")["spec"]["selector"]["matchLabels"]
    for document in found:
        if document["kind"] == "PodDisruptionBudget":
            assert "minAvailable" not in document["spec"], "one replica could never be drained"
            assert document["spec"]["maxUnavailable"] == 1
            assert document["spec"]["selector"]["matchLabels"] != daemons, (
                "a DaemonSet's pods are not evicted by a drain"
            )


def test_selectors_select_and_do_not_hold_the_version() -> None:
    for document in rendered():
        if document["kind"] in ("DaemonSet", "Deployment"):
            selector = document["spec"]["selector"]["matchLabels"]
            assert selector.items() <= document["spec"]["template"]["metadata"]["labels"].items()
            assert "app.kubernetes.io/version" not in selector


@pytest.mark.parametrize("name", ["training-job.yaml", "training-jobset.yaml"])
def test_a_training_pod_mounts_the_socket_and_nothing_else(name: str) -> None:
    found = documents((FOLDER / "examples" / name).read_text())
    job = next(document for document in found if document["kind"] in ("Job", "JobSet"))
    template = (
        job["spec"]["template"]
        if job["kind"] == "Job"
        else job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    )
    spec = template["spec"]
    daemon = pod(one(rendered(), "DaemonSet"))
    sockets = {volume["name"]: volume for volume in daemon["volumes"]}["socket"]["hostPath"]["path"]
    assert [volume["hostPath"]["path"] for volume in spec["volumes"]] == [sockets]
    assert spec["containers"][0]["volumeMounts"] == [{"name": "backstay", "mountPath": sockets, "readOnly": True}]
    assert spec["securityContext"]["supplementalGroups"] == [daemon["securityContext"]["runAsGroup"]]
    settings = tomllib.loads(one(rendered(), "ConfigMap")["data"]["backstayd.toml"])
    variables = {entry["name"]: entry["value"] for entry in spec["containers"][0]["env"]}
    assert variables["BACKSTAY_SOCKET"] == settings["node"]["socket"]
    for forbidden in ("hostPID", "hostIPC", "hostNetwork"):
        assert forbidden not in spec


def test_a_prepared_node_has_the_directories_that_the_daemon_mounts() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["node"]
    unit = (FOLDER / "node-setup" / "run-backstay-memory.mount").read_text()
    assert f"Where={values['memoryPath']}" in unit
    assert f"uid={values['userID']},gid={values['userID']}" in unit
    assert f"size={values['memory'].removesuffix('i')}" in unit
    directory = (FOLDER / "node-setup" / "backstay.conf").read_text()
    assert f"d {values['socketPath']} 0750 {values['userID']} {values['userID']}" in directory


def test_the_image_runs_as_the_charts_user_and_installs_what_exists() -> None:
    text = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    values = yaml.safe_load((CHART / "values.yaml").read_text())["node"]
    assert f"USER {values['userID']}:{values['userID']}" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = re.search(r'"\.\[([a-z0-9,]+)\]"', text)
    assert found is not None
    extras = found[1].split(",")
    assert set(extras) <= set(project["optional-dependencies"])
    installed = [*project["dependencies"], *(d for extra in extras for d in project["optional-dependencies"][extra])]
    assert not [dependency for dependency in installed if dependency.startswith("torch")]
    for source in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split())


def test_the_versions_agree() -> None:
    from backstay import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == __version__
