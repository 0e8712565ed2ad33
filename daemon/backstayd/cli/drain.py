"""`backstay drain NODE`: have protection moved away from a node, and wait until it may be stopped.

Repeats its order while it waits, so that a coordinator that takes over meanwhile knows of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Final

from backstay.errors import UnavailableError
from backstayd.cli import client
from backstayd.cli.tables import as_json
from backstayd.printable import printable, say

CALL_S: Final = 5.0  # longest wait for one answer
POLL_S: Final = 0.5


def run(arguments: argparse.Namespace) -> int:
    name = arguments.node
    state, reason = _wait(arguments) if arguments.wait else _order(arguments)
    if arguments.json:
        say(as_json({"node": name, "draining": state, "reason": reason}))
    else:
        say(f"{name}: {describe(state, printable(reason), undo=arguments.undo)}")
    return 0


def describe(state: str, reason: str, *, undo: bool) -> str:
    """One line for people."""
    if undo:
        return "drains no more" if not state else "is told; it drains no more in a moment"
    return {"safe": f"drained: {reason}", "draining": f"drains: {reason}"}.get(state, "is told to drain")


def _order(arguments: argparse.Namespace) -> tuple[str, str]:
    calls = argparse.Namespace(**vars(arguments) | {"timeout_s": min(CALL_S, arguments.timeout_s)})
    with client.connect(calls) as coordinator:
        try:
            return coordinator.drain(arguments.node, undo=arguments.undo)
        except UnavailableError as error:
            raise client.unreachable(error) from error


def _wait(arguments: argparse.Namespace) -> tuple[str, str]:
    """Order until it has come true; raises UnavailableError when that takes too long."""
    deadline_s = time.monotonic() + arguments.timeout_s
    wanted, said, problem = "" if arguments.undo else "safe", "", ""
    while True:
        try:
            state, reason = _order(arguments)
            problem = reason
        except UnavailableError as error:  # it may be the coordinator's turn to be restarted
            state, problem = "unknown", str(error).partition("\n")[0]
        if state == wanted:
            return state, reason
        if problem != said and not arguments.json:
            say(f"{arguments.node}: {printable(problem) or 'waits for the node to obey'}", sys.stderr)
            said = problem
        if time.monotonic() >= deadline_s:
            what = "still drains" if arguments.undo else "is not drained"
            raise UnavailableError(
                f"{arguments.node} {what} after {arguments.timeout_s:g} s: {problem or 'it does not obey yet'}",
                reason="not_drained",
            )
        time.sleep(min(POLL_S, max(0.0, deadline_s - time.monotonic())))
