"""The operator's orders: `backstay forget`, `distrust`, `trust` and `drain`. One function each, in the table at the end.

Each returns its result as JSON and as text. Must not decide anything: the coordinator does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from backstay.errors import UnavailableError
from backstayd.cli.coordinator_client import connect, full_name
from backstayd.cli.tables import as_json
from backstayd.printable import printable, say

CALL_S: Final = 5.0  # longest wait for one answer about a drain
POLL_S: Final = 0.5

Done = tuple[dict[str, Any], str]


def run(arguments: argparse.Namespace) -> int:
    document, text = ORDERS[arguments.command](arguments)
    say(as_json(document) if arguments.json else text)
    return 0


def _forget(arguments: argparse.Namespace) -> Done:
    """Delete a run from the memory of every node. State that is not stored elsewhere is lost."""
    with connect(arguments) as client:
        run_ = full_name(client, arguments.run)
        client.forget(run_)
    return {"run": run_, "forgotten": True}, f"{run_} is being deleted on every node"


def _distrust(arguments: argparse.Namespace) -> Done:
    """Exclude a snapshot from all future restores. Deletes nothing."""
    with connect(arguments) as client:
        run_ = full_name(client, arguments.run)
        outlook = client.distrust(run_, arguments.step, arguments.reason)
    document = {"run": run_, "step": arguments.step, "reason": arguments.reason, "outlook": outlook}
    text = f"step {arguments.step} of {run_} and every snapshot trained from it will not be restored again"
    return document, f"{text}\na restart now: {printable(outlook)}"


def _trust(arguments: argparse.Namespace) -> Done:
    """Undo every distrust of a run and reset its count of restores."""
    with connect(arguments) as client:
        run_ = full_name(client, arguments.run)
        count = client.trust(run_)
    text = f"{run_}: {count} snapshot{'' if count == 1 else 's'} trusted again; its count of restores was reset"
    return {"run": run_, "trusted": count}, text


def _drain(arguments: argparse.Namespace) -> Done:
    """Move protection away from a node, and with --wait wait until it may be stopped."""
    name = arguments.node
    state, reason = _wait_for_drain(arguments) if arguments.wait else _order_drain(arguments)
    if arguments.undo:
        text = "no longer draining" if not state else "asked to stop draining; it will in a moment"
    else:
        shown = printable(reason)
        text = {"safe": f"drained: {shown}", "draining": f"draining: {shown}"}.get(state, "asked to drain")
    return {"node": name, "draining": state, "reason": reason}, f"{name}: {text}"


def _order_drain(arguments: argparse.Namespace) -> tuple[str, str]:
    calls = argparse.Namespace(**vars(arguments) | {"timeout_s": min(CALL_S, arguments.timeout_s)})
    with connect(calls) as client:
        return client.drain(arguments.node, undo=arguments.undo)


def _wait_for_drain(arguments: argparse.Namespace) -> tuple[str, str]:
    """Repeat the order until it is carried out; raises UnavailableError when that takes too long.

    It is repeated so that a coordinator that takes over meanwhile knows of it.
    """
    deadline_s = time.monotonic() + arguments.timeout_s
    wanted, shown, problem = "" if arguments.undo else "safe", "", ""
    while True:
        try:
            state, reason = _order_drain(arguments)
            problem = reason
        except UnavailableError as error:  # it may be the coordinator's turn to be restarted
            state, problem = "unknown", str(error).partition("\n")[0]
        if state == wanted:
            return state, reason
        if problem != shown and not arguments.json:
            say(f"{arguments.node}: {printable(problem) or 'waiting for the node'}", sys.stderr)
            shown = problem
        if time.monotonic() >= deadline_s:
            what = "is still draining" if arguments.undo else "is not drained"
            raise UnavailableError(
                f"{arguments.node} {what} after {arguments.timeout_s:g} s: {problem or 'the node has not reacted yet'}",
                reason="not_drained",
            )
        time.sleep(min(POLL_S, max(0.0, deadline_s - time.monotonic())))


ORDERS: Final[Mapping[str, Callable[[argparse.Namespace], Done]]] = {
    "forget": _forget,
    "distrust": _distrust,
    "trust": _trust,
    "drain": _drain,
}
