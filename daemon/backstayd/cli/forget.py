"""`backstay forget RUN`: free the memory of a run on every node. What was not saved elsewhere is gone then."""

from __future__ import annotations

import argparse

from backstayd.cli import client
from backstayd.cli.tables import as_json
from backstayd.printable import say


def run(arguments: argparse.Namespace) -> int:
    run_ = client.full_name(arguments)
    client.forget(arguments, run_)
    say(as_json({"run": run_, "forgotten": True}) if arguments.json else f"{run_} is being deleted on every node")
    return 0
