"""Somebody who looks at a cluster all the time: every status document, and the words that each command makes of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from backstay.errors import BackstayError
from backstay.testing import LocalCluster
from backstayd.cli import explain, report, snapshots, status

PERIOD_S = 0.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One moment. ``trained``: the newest step that every rank had committed before the document was asked for."""

    phase: str
    trained: int
    run: dict[str, Any]
    events: list[dict[str, Any]]

    @property
    def word(self) -> str:
        return str(self.run["verdict"]["word"])

    @property
    def texts(self) -> str:
        """What the commands print of this moment, without the events, which are of the past."""
        run = self.run
        document = {
            "runs": [run], "nodes": [], "timeline": [], "generation": {"number": 1}, "is_settled": True,
        }  # fmt: skip
        entry = {"run": run["run"], "is_over": False, "ledger": run["ledger"]}
        found = [status.describe(document, events=0), snapshots.describe(run), explain.describe(run)]
        return "\n".join([*found, report.describe(entry)])


@dataclass(slots=True)
class Onlooker:
    """What was seen, and what the test knows to be true meanwhile."""

    run: str
    phase: str = ""
    trained: int = 0
    looks: list[Look] = field(default_factory=list)

    def of(self, phase: str) -> list[Look]:
        found = [look for look in self.looks if look.phase == phase]
        assert found, f"nobody looked during {phase!r}"
        return found


@contextmanager
def onlooker(cluster: LocalCluster, run: str) -> Iterator[Onlooker]:
    """Looks until the end of the block; what it saw is judged by the test."""
    seen, stop = Onlooker(run), threading.Event()

    def look() -> None:
        while not stop.wait(PERIOD_S):
            phase, trained = seen.phase, seen.trained
            try:
                document = cluster.status()
            except BackstayError:
                continue
            if phase != seen.phase:
                continue  # on the border of two
            for found in document["runs"]:
                if found["run"] == run:
                    seen.looks.append(Look(phase=phase, trained=trained, run=found, events=document["timeline"]))

    thread = threading.Thread(target=look, name="onlooker")
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
