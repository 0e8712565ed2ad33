"""`backstay snapshots [RUN]`: every snapshot in memory, how safe it is, and where its shards are. Reads only."""

from __future__ import annotations

import argparse
from typing import Any

from backstayd.cli.coordinator_client import find_run, get_status
from backstayd.cli.status import describe_storage
from backstayd.cli.tables import as_json, date_time, table
from backstayd.printable import printable_values, say
from backstayd.units import format_size


def run(arguments: argparse.Namespace) -> int:
    document = get_status(arguments)
    runs = [find_run(document, arguments.run)] if arguments.run else document["runs"]
    if arguments.json:
        say(as_json([{"run": r["run"], "snapshots": r["snapshots"], "storage": r["storage"]} for r in runs]))
    else:
        say("\n\n".join(describe(run_) for run_ in runs) or "no run is known")
    return 0


def describe(run_: dict[str, Any]) -> str:
    """The snapshots of one run as a table, newest first, with a sentence for each that cannot be restored."""
    run_ = printable_values(run_)
    snapshots = sorted(run_["snapshots"], key=lambda item: (item["attempt"], item["step"]), reverse=True)
    rows = [
        (
            snapshot["step"],
            snapshot["attempt"],
            snapshot["state"],
            snapshot["spares"],
            f"{sum(1 for shard in snapshot['shards'] if shard['nodes'])}/{len(snapshot['shards'])}",
            format_size(sum(shard["size_bytes"] for shard in snapshot["shards"])),
            (snapshot["snapshot_id"] or "")[:12],
            _places(snapshot["shards"]),
        )
        for snapshot in snapshots
    ]
    lines = [f"{run_['run']}  {run_['redundancy']}"]
    lines.append(table(("STEP", "ATTEMPT", "STATE", "SPARES", "SHARDS", "SIZE", "SNAPSHOT ID", "RANK@NODES"), rows))
    lines += [f"step {item['step']}: {item['missing']}" for item in snapshots if item["missing"]]
    return "\n".join([*lines, *_persisted(run_["storage"])])


def _persisted(storage: dict[str, Any] | None) -> list[str]:
    """The snapshots on durable storage, newest first."""
    if storage is None:
        return []
    rows = [
        (
            item["step"],
            item["attempt"],
            "damaged" if item["problem"] else "persisted",
            item["world_size"],
            format_size(item["size_bytes"]),
            item["snapshot_id"][:12],
            date_time(item["unix_s"]) if item["unix_s"] else "just now",
        )
        for item in storage["snapshots"]
    ]
    lines = ["", f"on durable storage in {storage['url']}"]
    lines.append(table(("STEP", "ATTEMPT", "STATE", "RANKS", "SIZE", "SNAPSHOT ID", "WRITTEN"), rows))
    lines += describe_storage(storage)[1:]
    problems = [item for item in storage["snapshots"] if item["problem"]] + storage["unreadable"]
    return lines + [f"step {item['step']} of attempt {item['attempt']}: {item['problem']}" for item in problems]


def _places(shards: list[dict[str, Any]], limit: int = 16) -> str:
    places = [f"{shard['rank']}@{'+'.join(shard['nodes']) or 'nowhere'}" for shard in shards]
    more = f" and {len(places) - limit} more" if len(places) > limit else ""
    return " ".join(places[:limit]) + more
