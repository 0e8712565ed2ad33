"""`backstay trust RUN`: take back every distrust of a run and count its restores anew."""

from __future__ import annotations

import argparse

from backstayd.cli import client
from backstayd.cli.tables import as_json
from backstayd.printable import say


def run(arguments: argparse.Namespace) -> int:
    run_ = client.full_name(arguments)
    count = client.trust(arguments, run_)
    if arguments.json:
        say(as_json({"run": run_, "trusted": count}))
    else:
        say(f"{run_}: {count} snapshot{'' if count == 1 else 's'} trusted again; its restores are counted anew")
    return 0
