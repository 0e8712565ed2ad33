"""Watches a training run of the demo: reads ranks' notes and the coordinator's status, shows progress, detects failures.

All waiting of the demo happens here, with a deadline and a reason. Changes nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from backstay.errors import BackstayError, UnavailableError
from backstay.testing.cluster import LocalCluster
from backstay.testing.demo.launch import TorchRun
from backstay.testing.demo.notes import Line, RunNotes
from backstay.testing.processes import ProcessKeeper, tail

T = TypeVar("T")
_POLL_S: Final = 0.05
_STATUS_EVERY_S: Final = 0.3
_PROGRESS_EVERY_S: Final = 4.0
_SHOWN: Final = ("node_lost", "decided", "refused", "quarantined", "rebuild", "interval_raised", "settled")


class DemoError(BackstayError):
    """The demo could not be completed; whether the runs are equal is unknown."""


class LostForGoodError(BackstayError):
    """A trainer's restore() raised UnrecoverableError; the message is the product's own."""


@dataclass(slots=True)
class Printer:
    """Prints lines with the seconds since the start of the demo."""

    began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        sys.stdout.write(f"[{time.monotonic() - self.began:6.1f} s] {text}\n")
        sys.stdout.flush()


@dataclass(slots=True, kw_only=True)
class Watch:
    """Observes a run. ``timeline`` keeps the coordinator's entries across its death."""

    run: TorchRun
    notes: RunNotes
    keeper: ProcessKeeper
    printer: Printer
    deadline: float  # of the whole demo, on time.monotonic()
    cluster: LocalCluster | None = None
    timeline: dict[tuple[float, str, str], dict[str, Any]] = field(default_factory=dict)
    run_status: dict[str, Any] = field(default_factory=dict)
    destroyed: set[int] = field(default_factory=set)  # nodes whose agent was killed deliberately
    replaced: set[int] = field(default_factory=set)  # nodes that started empty after the current fault
    _next_status: float = 0.0
    _next_progress: float = 0.0
    _shown_step: int = 0

    def wait(self, condition: Callable[[], T], deadline_s: float, why: str) -> T:
        """Poll everything until ``condition`` is true; raises DemoError with evidence after ``deadline_s``."""
        deadline = min(self.deadline, time.monotonic() + deadline_s)
        while True:
            self.poll()
            if value := condition():
                return value
            if time.monotonic() > deadline:
                raise DemoError(f"{self.run.name} run: waited {deadline_s:g} s for {why}, in vain\n{self.evidence()}")
            time.sleep(_POLL_S)

    def poll(self) -> None:
        for rank, line in self.notes.poll():
            self._check_line(rank, line)
        if self.cluster is not None and time.monotonic() >= self._next_status:
            self._next_status = time.monotonic() + _STATUS_EVERY_S
            self.read_status()
        for node, agent in self.run.agents.items():
            if node not in self.destroyed and agent.poll() not in (None, 0):
                raise DemoError(f"the agent of node {node} ended with status {agent.returncode}\n{self.evidence()}")
        self._show_progress()

    def read_status(self) -> None:
        """Read the coordinator's status, if it answers."""
        if self.cluster is None:
            return
        try:
            status = self.cluster.status()
        except UnavailableError:
            return
        for entry in status.get("timeline", ()):
            key = (float(entry["time_unix_s"]), str(entry["kind"]), str(entry["message"]))
            if key not in self.timeline:
                self.timeline[key] = entry
                if entry["kind"] in _SHOWN:
                    self.printer.say(f"    coordinator: {entry['message']}")
        wanted = f"demo/{self.run.run_id}"
        self.run_status = next((dict(entry) for entry in status["runs"] if entry["run"] == wanted), self.run_status)

    def first_event(self, since_unix_s: float, *kinds: str) -> dict[str, Any] | None:
        """The oldest timeline entry of one of ``kinds`` after ``since_unix_s``."""
        times = [key for key in self.timeline if key[0] >= since_unix_s and key[1] in kinds]
        return self.timeline[min(times)] if times else None

    def wait_for_end(self, deadline_s: float) -> None:
        """Wait until every agent left with status 0."""
        agents = self.run.agents
        self.wait(
            lambda: all(agent.poll() == 0 for node, agent in agents.items() if node not in self.destroyed),
            deadline_s,
            "every agent to finish",
        )
        self.notes.poll()

    def evidence(self) -> str:
        """Tails of the logs of this run's agents, and of the daemons."""
        status = f"--- run as the coordinator sees it\n{self.run_status}\n" if self.run_status else ""
        keepers = [self.keeper] if self.cluster is None else [self.keeper, self.cluster.keeper]
        paths = {path for keeper in keepers for path in keeper.log_dir.glob("*.log")}
        ordered = sorted(paths, key=lambda path: path.stat().st_mtime)
        return status + "\n".join(f"--- {path.name}\n{tail(path, line_count=12)}" for path in ordered)

    def _check_line(self, rank: int, line: Line) -> None:
        if line["kind"] == "error" and line["error"] == "UnrecoverableError":
            raise LostForGoodError(line["message"])
        if line["kind"] == "error" and line["error"] not in ("RuntimeError", "DistBackendError", "DistNetworkError"):
            self.printer.say(f"    rank {rank}: {line['error']}: {line['message'].splitlines()[0][:200]}")

    def _show_progress(self) -> None:
        if time.monotonic() < self._next_progress:
            return
        step = self.notes.step_reached_by_all()
        if step == self._shown_step:
            return
        self._next_progress = time.monotonic() + _PROGRESS_EVERY_S
        self._shown_step = step
        losses = [line["value"] for lines in self.notes.ranks for line in lines[-3:] if line["kind"] == "step"]
        loss = f", loss {sum(losses) / len(losses):.3f}" if losses else ""
        safe = ""
        if self.run_status:
            safe = (
                f", {self.run_status.get('redundancy', '')}, protected step {self.run_status.get('protected_step', 0)}"
            )
        self.printer.say(f"{self.run.name}: step {step} of {self.run.scenario.steps}{loss}{safe}")
