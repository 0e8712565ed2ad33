"""One rank of a world that never calls restore() beside others that do. A script; its argument is JSON: ``rank``,
``world_size``, ``absent``, ``port``, ``deadline_s``, ``out`` (a directory: ``<rank>.json`` is what restore() said).
"""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import backstay
from backstay.errors import BackstayError


def main() -> int:
    options = json.loads(sys.argv[1])
    rank, out = options["rank"], Path(options["out"])
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(options["world_size"]))
    address = f"tcp://127.0.0.1:{options['port']}"
    # Far longer than the test waits: nothing but restore()'s own deadline may end its waiting.
    dist.init_process_group(
        "gloo",
        init_method=address,
        rank=rank,
        world_size=options["world_size"],
        timeout=dt.timedelta(seconds=900),
    )
    if rank == options["absent"]:
        signal.pause()
    model = torch.nn.Linear(3, 3)
    keeper = backstay.Snapshotter(model, torch.optim.SGD(model.parameters()), run_id="absent")
    found = {"error": "", "reason": "", "message": ""}
    try:
        keeper.restore(deadline_s=options["deadline_s"])
    except BackstayError as error:
        found = {"error": type(error).__name__, "reason": error.reason, "message": str(error)}
    whole = out / f"{rank}.part"
    whole.write_text(json.dumps(found))
    whole.rename(out / f"{rank}.json")
    return 3


if __name__ == "__main__":
    sys.exit(main())
