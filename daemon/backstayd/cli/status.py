"""`backstay status`: nodes, runs and the last events. Reads only."""

from __future__ import annotations

import argparse
from typing import Any

from backstayd.cli.coordinator import get_status
from backstayd.cli.tables import as_json, clock_time, table
from backstayd.config import format_size


def run(arguments: argparse.Namespace) -> int:
    document = get_status(arguments)
    print(as_json(document) if arguments.json else describe(document, events=arguments.timeline))
    return 0


def describe(document: dict[str, Any], *, events: int) -> str:
    """The status document as text for people, with the last ``events`` of its timeline."""
    generation = document["generation"]["number"]
    settled = "settled" if document["is_settled"] else "settling: it decides nothing until the known nodes reported"
    leader = document.get("leader") or {}
    who = f"coordinator {leader['address']} leads, term {leader['term']}," if leader.get("election") else "coordinator"
    parts = [f"{who} generation {generation}, {settled}", "", "NODES", _nodes(document["nodes"]), "", "RUNS"]
    parts.append(_runs(document["runs"]))
    parts += [f"{node['name']}: {node['drain_reason']}" for node in document["nodes"] if node.get("drain_reason")]
    for run_ in document["runs"]:
        parts += _notes(run_)
    shown = document["timeline"][-events:] if events > 0 else []
    if shown:
        rows = [(clock_time(event["time_unix_s"]), event["run"], event["kind"], event["message"]) for event in shown]
        parts += ["", "EVENTS", table(("TIME", "RUN", "KIND", "WHAT"), rows)]
    return "\n".join(parts)


def _nodes(nodes: list[dict[str, Any]]) -> str:
    rows = [
        (
            node["name"],
            f"{node['state']}, {node['draining']}" if node.get("draining") else node["state"],
            node["domain"],
            node["bulk_address"],
            f"{format_size(node['used_bytes'])} of {format_size(node['capacity_bytes'])}",
            node["corrupt_count"],
            node["version"],
        )
        for node in nodes
    ]
    return table(("NODE", "STATE", "DOMAIN", "BULK", "MEMORY", "CORRUPT", "VERSION"), rows)


def _runs(runs: list[dict[str, Any]]) -> str:
    rows = [
        (
            run_["run"],
            run_["redundancy"],
            f"{len(run_['sessions'])}/{run_['world_size']}",
            run_["attempt"],
            run_["complete_step"],
            run_["protected_step"],
            run_["interval_steps"],
        )
        for run_ in runs
    ]
    return table(("RUN", "REDUNDANCY", "TRAINERS", "ATTEMPT", "COMPLETE", "PROTECTED", "EVERY"), rows)


def describe_storage(storage: dict[str, Any] | None) -> list[str]:
    """What is on durable storage and on its way there, in sentences."""
    if storage is None:
        return []
    lines = [
        f"step {storage['step']} of attempt {storage['attempt']} is on durable storage"
        if storage["step"]
        else "nothing is on durable storage yet"
    ]
    upload = storage["upload"]
    if upload:
        done, total = upload["done_bytes"], upload["total_bytes"]
        lines.append(
            f"step {upload['step']} is copied to {storage['url']}: {format_size(done)} of {format_size(total)} "
            f"({100 * done // max(1, total)} %), {upload['shards_done']} of {upload['shards']} shards"
        )
    if storage["problem"]:
        lines.append(f"durable storage: {storage['problem']}")
    return lines


def _notes(run_: dict[str, Any]) -> list[str]:
    notes = []
    if run_["reason"]:
        notes.append(f"{run_['run']}: {run_['reason']}")
    ttl_s = run_.get("forgotten_in_s")
    if ttl_s is not None:
        notes.append(f"{run_['run']}: no trainer is connected; its memory is freed in {ttl_s / 3600:.1f} h")
    notes += [f"{run_['run']}: {line}" for line in describe_storage(run_.get("storage"))]
    decision = run_["decision"]
    if decision and decision["phase"] != "release" and decision["message"]:
        notes.append(f"{run_['run']}: recovery in phase {decision['phase']}: {decision['message']}")
    notes += [
        f"{run_['run']}: step {item['step']} of attempt {item['attempt']} is distrusted: {item['reason']}"
        for item in run_.get("distrusted", ())
    ]
    notes += [
        f"{run_['run']}: {item['what']} on {item['node']} is quarantined: {item['reason']}"
        for item in run_["quarantined"]
    ]
    return notes
