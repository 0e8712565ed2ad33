"""`backstay status`: nodes, runs and the last events. Reads only."""

from __future__ import annotations

import argparse
from typing import Any, Final

from backstayd.cli.coordinator_client import get_status
from backstayd.cli.status_watch import count_sentence, watch
from backstayd.cli.tables import as_json, clock_time, table
from backstayd.core.timeline import FREQUENT_KINDS
from backstayd.printable import printable_values, say
from backstayd.units import format_size

MANY_NODES: Final = 20  # with more, only unhealthy nodes are listed


def run(arguments: argparse.Namespace) -> int:
    if arguments.watch:
        return watch(lambda: get_status(arguments, is_brief=True), lambda document: _text(document, arguments))
    document = get_status(arguments, is_brief=not arguments.json)
    say(as_json(document) if arguments.json else _text(document, arguments))
    return 0


def _text(document: dict[str, Any], arguments: argparse.Namespace) -> str:
    return describe(document, events=arguments.timeline, has_all_nodes=arguments.nodes)


def describe(document: dict[str, Any], *, events: int, has_all_nodes: bool = False) -> str:
    """The status document as text: whether each job would survive the next failure, then the rest.

    Args:
        events: How many of the newest events to show, without those of every snapshot.
        has_all_nodes: List every node even if there are many; else only unhealthy ones.
    """
    document = printable_values(document)
    generation = document["generation"]["number"]
    settled = (
        "settled" if document["is_settled"] else "settling: it makes no decisions until the known nodes have reported"
    )
    leader = document.get("leader") or {}
    who = f"coordinator {leader['address']} leads, term {leader['term']}," if leader.get("election") else "coordinator"
    parts = [f"{who} generation {generation}, {settled}", "", "RUNS", _runs(document["runs"])]
    parts += [f"{node['name']}: {node['drain_reason']}" for node in document["nodes"] if node.get("drain_reason")]
    for run_ in document["runs"]:
        parts += _notes(run_)
    parts += ["", f"NODES  {count_sentence(document['nodes'])}", *_nodes(document["nodes"], has_all=has_all_nodes)]
    weak = [row for run_ in document["runs"] for row in _weak_groups(run_)]
    if weak:
        shown_groups = table(("RUN", "STEP", "SURVIVES", "MISSING", "MEMBERS"), weak[:MANY_NODES])
        parts += ["", f"GROUPS weaker than planned: {len(weak)}", shown_groups]
    rare = [event for event in document["timeline"] if event["kind"] not in FREQUENT_KINDS]
    shown = rare[-events:] if events > 0 else []
    if shown:
        rows = [(clock_time(event["time_unix_s"]), event["run"], event["kind"], event["message"]) for event in shown]
        parts += ["", "EVENTS", table(("TIME", "RUN", "KIND", "WHAT"), rows)]
    return "\n".join(parts)


def _nodes(nodes: list[dict[str, Any]], *, has_all: bool) -> list[str]:
    shown = nodes
    if len(nodes) > MANY_NODES and not has_all:
        shown = [n for n in nodes if n["state"] != "live" or n.get("draining") or n["corrupt_count"]]
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
        for node in shown
    ]
    lines = (
        [table(("NODE", "STATE", "DOMAIN", "BULK", "MEMORY", "CORRUPT", "VERSION"), rows)] if rows or not nodes else []
    )
    left = len(nodes) - len(shown)
    return [*lines, f"{left} healthy nodes are not listed; use --nodes to list them"] if left else lines


def _runs(runs: list[dict[str, Any]]) -> str:
    rows = [
        (
            run_["run"],
            run_["verdict"]["word"],
            max(0, run_["verdict"]["survives"]),
            run_["redundancy"],
            f"{run_['trainer_count']}/{run_['world_size']}",
            run_["attempt"],
            run_["complete_step"] or "-",
            run_["protected_step"] or "-",
            (run_["storage"] or {}).get("step"),
            run_["interval_steps"],
        )
        for run_ in runs
    ]
    headers = (
        "RUN",
        "VERDICT",
        "SURVIVES",
        "REDUNDANCY",
        "TRAINERS",
        "ATTEMPT",
        "COMPLETE",
        "PROTECTED",
        "STORED",
        "EVERY",
    )
    return table(headers, rows)


def _weak_groups(run_: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (
            run_["run"],
            group.get("step"),
            f"{max(0, group['spares'])} of {group['m']}",
            ", ".join(group.get("missing", ())),
            ", ".join(group["members"]),
        )
        for group in run_["groups"]
        if group["is_weak"]
    ]


def describe_storage(storage: dict[str, Any] | None) -> list[str]:
    """What is on durable storage and what is being copied there, in sentences."""
    if storage is None:
        return []
    lines = [
        f"step {storage['step']} of attempt {storage['attempt']} is on durable storage"
        if storage["step"]
        else "durable storage is empty"
    ]
    upload = storage["upload"]
    if upload:
        done, total = upload["done_bytes"], upload["total_bytes"]
        lines.append(
            f"step {upload['step']} is being copied to {storage['url']}: {format_size(done)} of {format_size(total)} "
            f"({100 * done // max(1, total)} %), {upload['shards_done']} of {upload['shards']} shards"
        )
    if storage["problem"]:
        lines.append(f"durable storage: {storage['problem']}")
    return lines


def describe_lag(run_: dict[str, Any]) -> list[str]:
    """What a restart would cost now, for a run that trains ahead of its protected snapshots."""
    behind = run_["behind"]
    if not behind:
        return []
    steps = f"{behind['steps']} steps" if behind["steps"] else "all steps"
    return [f"a restart now would repeat {steps} from the last {behind['seconds']:.0f} s"]


def _notes(run_: dict[str, Any]) -> list[str]:
    notes = []
    reason = run_["verdict"]["reason"]
    if reason:
        notes.append(f"{run_['run']}: {reason}")
    notes += [f"{run_['run']}: {line}" for line in describe_lag(run_)]
    ttl_s = run_["forgotten_in_s"]
    if ttl_s is not None:
        notes.append(f"{run_['run']}: no trainer is connected; its memory will be freed in {ttl_s / 3600:.1f} h")
    notes += [f"{run_['run']}: {line}" for line in describe_storage(run_["storage"])]
    decision = run_["decision"]
    if decision and decision["phase"] != "release" and decision["message"]:
        notes.append(f"{run_['run']}: recovery in phase {decision['phase']}: {decision['message']}")
    notes += [
        f"{run_['run']}: step {item['step']} of attempt {item['attempt']} is distrusted: {item['reason']}"
        for item in run_["distrusted"]
    ]
    notes += [
        f"{run_['run']}: {item['what']} on {item['node']} is quarantined: {item['reason']}"
        for item in run_["quarantined"]
    ]
    return notes
