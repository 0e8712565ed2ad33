"""The test's side of ranks in many layouts: one process that forks them, world after world."""

from __future__ import annotations

import json
import math
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from backstay.testing.cluster import process_environment

Layout = tuple[str, tuple[int, ...]]


class LayoutRanks:
    """The process that forks the ranks; see ``tests.kit.layout_ranks``."""

    def __init__(self, log: Path) -> None:
        self.log = log
        root = str(Path(__file__).parents[2])
        environment = process_environment()
        environment["PYTHONPATH"] = f"{root}:{environment['PYTHONPATH']}"
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.kit.layout_ranks"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment, start_new_session=True,
            )  # fmt: skip

    def run(
        self, do: str, layout: Layout, run: str, sockets: list[str], *, seed: int, other: str = "", spoilt: int = -1
    ) -> list[dict[str, Any]]:
        """One world: build, restore, and for ``do="save"`` train and snapshot; fails on any rank's error.

        ``other``: what kind of layout the snapshot is of. ``spoilt``: a rank whose model is another; errors are returned then.
        """
        kind, sizes = layout
        order = {
            "do": do, "kind": kind, "sizes": sizes, "world_size": math.prod(sizes), "run": run, "sockets": sockets,
            "seed": seed, "other": other, "spoilt": spoilt,
        }  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], 150)
        assert ready, f"{do} of {layout} did not end: {self.log.read_text()[-2000:]}"
        answers: list[dict[str, Any]] = json.loads(self.process.stdout.readline())
        if spoilt >= 0:
            return answers
        errors = [f"rank {r}: {a['error']}\n{a.get('trace', '')}" for r, a in enumerate(answers) if "error" in a]
        assert not errors, f"{do} of {layout}: " + "\n".join(errors)
        return answers

    def close(self) -> None:
        self.process.kill()
        self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
