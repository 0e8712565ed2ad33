"""`backstay report [RUN]`: the ledger of a run: goodput, and what was lost when and why. Reads only."""

from __future__ import annotations

import argparse
from typing import Any

from backstay.errors import SnapshotNotFoundError
from backstayd.cli.coordinator_client import find_run, get_status
from backstayd.cli.tables import as_json, date_time, duration, table
from backstayd.printable import printable_values, say

PHASES = (("DETECT", "detect_s"), ("RESTART", "restart_s"), ("DECIDE", "decide_s"), ("LOAD", "release_s"))
LEGEND = (
    "DETECT: until a missing rank was noticed · RESTART: until every rank of the next world waited (the launcher's part) · "
    "DECIDE:\nuntil the snapshot was chosen · LOAD: until every host had verified it · DOWN: the sum of these · LOST: "
    "completed steps\nafter the restored one"
)


def run(arguments: argparse.Namespace) -> int:
    document = get_status(arguments)
    runs = _runs(document, arguments.run)
    if arguments.json:
        say(as_json({"time_unix_s": document["time_unix_s"], "runs": runs}))
    else:
        say("\n\n".join(describe(found) for found in runs) or "no run is known")
    return 0


def _runs(document: dict[str, Any], name: str | None) -> list[dict[str, Any]]:
    """Runs that are training or trained recently, with their ledgers; SnapshotNotFoundError for an unknown name."""
    current = [_entry(found, is_over=False) for found in document["runs"]]
    known = {found["run"] for found in current if found["ledger"]}
    over = [_entry(found, is_over=True) for found in document["finished"] if found["run"] not in known]
    names = {found["run"] for found in over}
    found = [entry for entry in current if entry["run"] not in names] + over
    if name is None:
        return found
    try:
        return [find_run({"runs": found, "is_settled": document["is_settled"]}, name)]
    except SnapshotNotFoundError as error:
        raise SnapshotNotFoundError(
            f"{error}. A finished run is kept by the coordinator that saw its end, until that coordinator stops; its log "
            "keeps one line about it",
            reason=error.reason,
        ) from error


def _entry(found: dict[str, Any], *, is_over: bool) -> dict[str, Any]:
    return {"run": found["run"], "is_over": is_over, "ledger": found["ledger"]}


def describe(found: dict[str, Any]) -> str:
    """One run's ledger as text."""
    found = printable_values(found)
    ledger = found["ledger"]
    if not ledger:
        return f"{found['run']}: as far as this coordinator knows, no world of it has trained yet"
    lines = [f"{found['run']}  {_state(found)}", _kept(ledger), "", _goodput(ledger), *_losses(ledger)]
    if ledger["interruptions"]:
        lines += ["", "INTERRUPTIONS", _table(ledger["interruptions"]), LEGEND]
    lines += _without(ledger)
    return "\n".join(lines)


def _state(found: dict[str, Any]) -> str:
    ledger = found["ledger"]
    if found["is_over"]:
        return "finished"
    state = "interrupted" if ledger["is_interrupted"] else "training"
    return f"{state}: attempt {ledger['attempt']}, step {ledger['newest_step']}"


def _kept(ledger: dict[str, Any]) -> str:
    began = date_time(ledger["began_unix_s"])
    if ledger["is_whole"]:
        return f"complete since its first step, {began}"
    return f"since {began}; earlier history is unknown: no surviving node recorded it"


def _goodput(ledger: dict[str, Any]) -> str:
    share, elapsed = ledger["goodput"], ledger["elapsed_s"]
    if share is None:
        return "goodput not known yet"
    return f"goodput {share:.4f}: {duration(ledger['productive_s'])} of {duration(elapsed)} were productive"


def _losses(ledger: dict[str, Any]) -> list[str]:
    count, steps = ledger["interruption_count"], ledger["steps_lost"]
    lines = [
        f"  {duration(ledger['down_s']):>10}  without training, in {count} interruption{'' if count == 1 else 's'}",
        f"  {duration(ledger['recompute_s']):>10}  recomputing {steps} lost step{'' if steps == 1 else 's'}",
        f"  {duration(ledger['blocked_s']):>10}  blocked by snapshots",
    ]
    if ledger["earlier_count"]:
        lines.append(f"  the first {ledger['earlier_count']} interruptions are counted in these sums but not listed")
    return lines


def _table(entries: list[dict[str, Any]]) -> str:
    rows = [
        (
            date_time(entry["noticed_unix_s"]),
            entry["cause"],
            *(_seconds(entry[name]) for _, name in PHASES),
            _seconds(entry["down_s"]),
            entry["newest_step"],
            entry["base_step"] if entry["is_over"] else "",
            entry["steps_lost"] if entry["is_over"] else "",
            entry["source"] or "in progress",
            f"{entry['outcome'] or '-'}; {entry['detail']}",
        )
        for entry in entries
    ]
    headers = ("NOTICED", "CAUSE", *(name for name, _ in PHASES), "DOWN", "AT", "FROM", "LOST", "SOURCE", "WHAT")
    return table(headers, rows)


def _seconds(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f} s"


def _without(ledger: dict[str, Any]) -> list[str]:
    """What restoring from durable storage alone would have lost; only if that is known for every interruption."""
    over = [entry for entry in ledger["interruptions"] if entry["is_over"]]
    known = [entry for entry in over if entry["steps_lost_from_storage"] is not None]
    if not over or len(known) < len(over) or ledger["earlier_count"]:
        return []
    steps = sum(entry["steps_lost_from_storage"] for entry in known)
    seconds = sum(entry["steps_lost_from_storage"] * entry["step_s"] for entry in known)
    sentence = (
        f"Restored from durable storage alone, with what it held then, these interruptions would have lost {steps} steps "
        f"({duration(seconds)}) instead of {ledger['steps_lost']} ({duration(ledger['recompute_s'])})"
    )
    return ["", sentence]
