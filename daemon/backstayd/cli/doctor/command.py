"""`backstay doctor`: checks this machine, its software, its daemon and the coordinator, and reports what would go wrong.

Changes nothing. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from backstay.errors import ConfigError, UnavailableError
from backstayd.cli.coordinator_client import get_status
from backstayd.cli.doctor import daemon_checks, machine_checks, software_checks
from backstayd.cli.doctor.findings import Finding, Level, fail, ok
from backstayd.cli.tables import as_json, table
from backstayd.config.schema import NodeConfig
from backstayd.printable import say


def run(arguments: argparse.Namespace) -> int:
    findings = examine(arguments)
    if arguments.json:
        rows = [{"level": item.level.value, "subject": item.subject, "detail": item.detail} for item in findings]
        say(as_json({"findings": rows, "is_healthy": all(item.level is not Level.FAIL for item in findings)}))
    else:
        say(table(("", "WHAT", "FOUND"), [(item.level.value, item.subject, item.detail) for item in findings]))
        counts = {level: sum(item.level is level for item in findings) for level in Level}
        say(f"\n{counts[Level.OK]} OK, {counts[Level.WARN]} WARN, {counts[Level.FAIL]} FAIL")
    return 1 if any(item.level is Level.FAIL for item in findings) else 0


def examine(arguments: argparse.Namespace) -> list[Finding]:
    """All findings, in the order in which a new user would look: software, machine, daemon, coordinator, trainer."""
    answer = daemon_checks.ask_daemon(arguments.socket, timeout_s=arguments.timeout_s)
    memory_dir = _memory_dir(arguments.memory_dir, answer.document)
    findings = [*software_checks.check_versions(), software_checks.check_codec()]
    findings += [
        machine_checks.check_memory_dir(memory_dir, pid=answer.pid),
        machine_checks.check_cgroup(memory_dir if memory_dir.exists() else Path("/"), pid=answer.pid),
        machine_checks.check_locked_memory(answer.pid),
        machine_checks.check_swap(),
        machine_checks.check_files(answer.pid),
    ]
    for address in arguments.address or _default_addresses(answer.document):
        findings.append(machine_checks.check_address(address, daemon_pid=answer.pid))
    findings.append(answer.finding)
    if answer.document is not None:
        findings.append(daemon_checks.check_link(answer.document))
    findings += _check_coordinator(arguments)
    findings += _check_timeouts(arguments, answer.document)
    return findings


def _check_coordinator(arguments: argparse.Namespace) -> list[Finding]:
    asked_unix_s = time.time()
    try:
        document = get_status(arguments)
    except (UnavailableError, ConfigError) as error:
        return [fail("coordinator", str(error).partition("\n")[0])]
    nodes = document["nodes"]
    live = sum(node["state"] == "live" for node in nodes)
    summary = f"{arguments.coordinator}: {live} of {len(nodes)} nodes live, {len(document['runs'])} runs"
    return [
        ok("coordinator", summary),
        daemon_checks.check_clock(document, asked_unix_s=asked_unix_s, lease_s=_lease_s(document)),
        software_checks.check_versions_agree({node["name"]: node["version"] for node in nodes}),
    ]


def _check_timeouts(arguments: argparse.Namespace, document: dict[str, Any] | None) -> list[Finding]:
    declared = daemon_checks.session_timeouts(document or {})
    if arguments.collective_timeout_s is not None:
        timeout_s, source = arguments.collective_timeout_s, "--collective-timeout-s"
    elif declared:
        timeout_s, source = min(declared), "attached trainers"
    else:
        text = "unknown: no attached trainer declared one; give --collective-timeout-s to check it"
        return [ok("collective timeout", text)]
    deadline_s, lease_s = arguments.restore_deadline_s, _lease_s(document or {})
    return [
        daemon_checks.check_collective_timeout(timeout_s, lease_s=lease_s, restore_deadline_s=deadline_s, source=source)
    ]


def _lease_s(document: dict[str, Any]) -> float:
    return float(document.get("lease_s") or NodeConfig().lease_s)


def _memory_dir(given: Path | None, document: dict[str, Any] | None) -> Path:
    reported = (document or {}).get("memory", {}).get("directory")
    return given or (Path(reported) if reported else NodeConfig().memory_dir)


def _default_addresses(document: dict[str, Any] | None) -> list[str]:
    bulk = (document or {}).get("node", {}).get("bulk_address")
    return [bulk] if bulk else [NodeConfig().bulk, NodeConfig().http]
