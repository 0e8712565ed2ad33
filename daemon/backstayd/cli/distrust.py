"""`backstay distrust RUN STEP --reason TEXT`: have a snapshot never restored again. Deletes nothing."""

from __future__ import annotations

import argparse

from backstay.errors import UsageError
from backstay.ids import RunKey
from backstayd.cli import coordinator
from backstayd.cli.tables import as_json
from backstayd.printable import printable, say


def run(arguments: argparse.Namespace) -> int:
    run_ = full_name(arguments.run, "distrust")
    outlook = coordinator.distrust(arguments, run_)
    if arguments.json:
        say(as_json({"run": run_, "step": arguments.step, "reason": arguments.reason, "outlook": outlook}))
    else:
        say(f"step {arguments.step} of {run_}, and what was trained from it, is not restored again")
        say(f"a restart now: {printable(outlook)}")
    return 0


def full_name(name: str, command: str) -> str:
    """``name`` if it is job/run_id: what changes a run does not guess which."""
    if "/" not in name:
        raise UsageError(
            f"{command} changes what is restored; name the run in full, such as default/{name}", reason="bad_arguments"
        )
    return str(RunKey.parse(name))
