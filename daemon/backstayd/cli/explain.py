"""`backstay explain RUN`: what a restart would restore now and from where, and the current decision. Reads only."""

from __future__ import annotations

import argparse
from typing import Any

from backstayd.cli.coordinator_client import find_run, get_status
from backstayd.cli.status import describe_lag
from backstayd.cli.tables import as_json, table
from backstayd.printable import printable_values, say


def run(arguments: argparse.Namespace) -> int:
    document = get_status(arguments)
    found = find_run(document, arguments.run)
    if arguments.json:
        say(as_json({"run": found["run"], "explain": found["explain"], "decision": found["decision"]}))
    else:
        say(describe(found))
        if not document["is_settled"]:
            say("\nThe coordinator has just started: reports of further nodes may change this.")
    return 0


def describe(run_: dict[str, Any]) -> str:
    """The plan of a recovery that would begin now, then the current decision."""
    run_ = printable_values(run_)
    plan = run_["explain"]
    lines = [f"{run_['run']}  {run_['redundancy']}", "", "IF IT RESTARTED NOW"]
    if plan is None:
        lines.append("unknown: the coordinator has no inventory of this run yet")
    else:
        lines.append(
            f"{plan['outcome']}{_base(plan)}: {plan['message']}" if plan["message"] else plan["outcome"] + _base(plan)
        )
        lines += [f"{run_['verdict']['reason']}; {line}" for line in describe_lag(run_)]
        if plan["sources"]:
            lines.append(_sources(plan["sources"]))
    decision = run_["decision"]
    if decision is not None:
        base = decision["base"]
        lines += ["", "CURRENT DECISION"]
        lines.append(
            f"{decision['outcome']}{_base(base) if base else ''}, phase {decision['phase']}, "
            f"this history is attempt {decision['attempt']} (world {run_['world_id'] or '-'})"
        )
        if decision["message"] and (decision["phase"], decision["outcome"]) != ("release", "NONE"):
            lines.append(decision["message"])
        if decision["sources"]:
            lines.append(_sources(decision["sources"]))
    return "\n".join(lines)


def _base(place: dict[str, Any]) -> str:
    return f" from step {place['step']} (attempt {place['attempt']})" if place.get("attempt") else ""


def _sources(sources: list[dict[str, Any]]) -> str:
    rows = [(source["rank"], source["kind"], ", ".join(source["holders"])) for source in sources]
    return table(("RANK", "SOURCE", "NODES"), rows)
