"""`backstay distrust RUN STEP --reason TEXT`: have a snapshot never restored again. Deletes nothing."""

from __future__ import annotations

import argparse

from backstayd.cli import client
from backstayd.cli.tables import as_json
from backstayd.printable import printable, say


def run(arguments: argparse.Namespace) -> int:
    run_ = client.full_name(arguments)
    outlook = client.distrust(arguments, run_)
    if arguments.json:
        say(as_json({"run": run_, "step": arguments.step, "reason": arguments.reason, "outlook": outlook}))
    else:
        say(f"step {arguments.step} of {run_}, and what was trained from it, is not restored again")
        say(f"a restart now: {printable(outlook)}")
    return 0
