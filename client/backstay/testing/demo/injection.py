"""Injects the faults of a scenario into a running cluster and measures detection, sources and recovery of each.

Losses are real: processes get SIGKILL, memory is deleted. Never touches the control run.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from backstay.errors import UnavailableError
from backstay.testing.cluster import LocalCluster
from backstay.testing.demo.launch import TorchRun
from backstay.testing.demo.scenario import Fault, Scenario
from backstay.testing.demo.watch import DemoError, Watch
from backstay.testing.rolling import upgrade_daemon

RECOVERY_DEADLINE_S: Final = 300.0
_REPLACEMENT_DELAY_S: Final = 1.0  # what a supervisor or an operator needs at the very least
_COORDINATOR_POINT: Final = "recorded_on_some"


@dataclass(slots=True, kw_only=True)
class FaultRecord:
    """The effect of one fault. Times are seconds from the injection; None if there was nothing to measure."""

    kind: str
    step: int
    what: str
    targets: tuple[int, ...]
    injected_at_step: int = 0
    injected_unix_s: float = 0.0
    detected_s: float | None = None
    detected_by: str = ""
    recovered_s: float | None = None
    restored_step: int | None = None
    outcome: str = ""
    steps_lost: int | None = None
    sources: list[dict[str, Any]] = field(default_factory=list)
    message: str = ""
    refused_ranks: list[int] = field(default_factory=list)

    def source_text(self) -> str:
        """Ranks by the source of their shard: ``local 0 2 3, rebuild 1``."""
        ranks: dict[str, list[str]] = {}
        for source in self.sources:
            ranks.setdefault(source["kind"], []).append(str(source["rank"]))
        return ", ".join(f"{kind} {' '.join(of_kind)}" for kind, of_kind in sorted(ranks.items()))

    @property
    def rebuilt_count(self) -> int:
        return sum(source["kind"] == "rebuild" for source in self.sources)


def coordinator_faults(armed: Path) -> dict[str, str]:
    """Environment of a coordinator that dies in the middle of a decision once ``armed`` is deleted; creates that file."""
    armed.touch()
    return {"BACKSTAY_FAULTS": f"{_COORDINATOR_POINT},once={armed}:kill"}


@dataclass(slots=True, kw_only=True)
class Injector:
    """Injects one fault after another, each only when the run is as well protected as its scenario requires."""

    scenario: Scenario
    cluster: LocalCluster
    run: TorchRun
    watch: Watch
    armed: Path
    records: list[FaultRecord] = field(default_factory=list)

    def inject(self, fault: Fault) -> FaultRecord:
        """Wait for the fault's step, inject it and wait for the recovery; returns its record."""
        record = FaultRecord(kind=fault.kind, step=fault.step, what=str(fault), targets=fault.targets)
        self.records.append(record)
        self.watch.wait(
            lambda: self.watch.notes.step_reached_by_all() >= fault.step,
            RECOVERY_DEADLINE_S,
            f"step {fault.step} on all ranks",
        )
        self._wait_for_redundancy(fault)
        record.injected_at_step = self.watch.notes.highest_step()
        self.watch.printer.say(f"FAULT at step {record.injected_at_step}: {fault}")
        record.injected_unix_s = time.time()
        {
            "trainer": self._trainer,
            "daemon": self._daemon,
            "node": self._nodes,
            "nodes": self._nodes,
            "coordinator": self._coordinator,
            "upgrade": self._upgrade,
            "handover": self._hand_over,
        }[fault.kind](fault, record)
        detected = f"detected after {record.detected_s:.1f} s, " if record.detected_s is not None else ""
        recovered = f"{record.recovered_s:.1f} s" if record.recovered_s is not None else "-"
        self.watch.printer.say(f"RECOVERED ({record.outcome}): {detected}resumed after {recovered}")
        return record

    def _wait_for_redundancy(self, fault: Fault) -> None:
        """Wait until redundancy is restored: the promise is to survive m losses, not m losses at any moment."""
        if not fault.is_node_loss:
            return
        enough = min(self.scenario.m, len(fault.targets)) if not self.scenario.lose else self.scenario.m
        self.watch.wait(
            lambda: int(self.watch.run_status.get("spares") or 0) >= enough and self.watch.run_status["protected_step"],
            RECOVERY_DEADLINE_S,
            f"a snapshot that survives {enough} losses",
        )

    # -- kinds --------------------------------------------------------------------------------------------------------

    def _trainer(self, fault: Fault, record: FaultRecord) -> None:
        self._kill_trainers(fault)
        self._see_recovery(record, "session_lost")

    def _daemon(self, fault: Fault, record: FaultRecord) -> None:
        pids = self.watch.notes.pids()
        before = self.watch.notes.highest_step()
        for node in fault.targets:
            self.cluster.kill_daemon(node)
        self._pause(_REPLACEMENT_DELAY_S)
        for node in fault.targets:
            self.cluster.restart_daemon(node, is_waiting=False)
        self._see_attached(fault)
        self._see_protected(record, pids, before)
        self._note_detection(record, "node_lost", "node_joined")

    def _upgrade(self, fault: Fault, record: FaultRecord) -> None:
        """As an operator would, daemon by daemon."""
        pids, before = self.watch.notes.pids(), self.watch.notes.highest_step()
        for node in fault.targets:
            upgrade_daemon(self.cluster, node)
        self._see_attached(fault)
        self._see_protected(record, pids, before)

    def _hand_over(self, fault: Fault, record: FaultRecord) -> None:
        pids, before = self.watch.notes.pids(), self.watch.notes.highest_step()
        self.cluster.stop_coordinator()
        self.cluster.start_coordinator()
        self.watch.wait(self._is_settled, RECOVERY_DEADLINE_S, "the next coordinator to have heard of every node")
        self._see_protected(record, pids, before)

    def _is_settled(self) -> bool:
        try:
            return bool(self.cluster.status()["is_settled"])
        except UnavailableError:
            return False

    def _see_attached(self, fault: Fault) -> None:
        self.watch.wait(
            lambda: all(self._has_trainers(node) for node in fault.targets),
            RECOVERY_DEADLINE_S,
            "the trainers to attach to the restarted daemon",
        )

    def _see_protected(self, record: FaultRecord, pids: list[int], before: int) -> None:
        """Wait for a later snapshot to be protected; no trainer may have noticed, and none may finish before."""
        self.run.permit(min(self.scenario.last_permitted_step(len(self.records)), self.scenario.steps - 1))
        wanted = min(before + 1, self.scenario.steps - 1)
        self.watch.wait(
            lambda: int(self.watch.run_status.get("protected_step") or 0) >= wanted,
            RECOVERY_DEADLINE_S,
            f"step {wanted} to be protected with the restarted daemon's help",
        )
        record.recovered_s = time.time() - record.injected_unix_s
        record.outcome = "UNINTERRUPTED" if self.watch.notes.pids() == pids else "INTERRUPTED"
        record.steps_lost = 0 if record.outcome == "UNINTERRUPTED" else None
        record.message = f"trainers ran on; step {wanted} was protected with the restarted daemon's participation"

    def _has_trainers(self, node: int) -> bool:
        try:
            return any(run["sessions"] for run in self.cluster.node_status(node)["runs"])
        except UnavailableError:
            return False

    def _nodes(self, fault: Fault, record: FaultRecord) -> None:
        self.watch.destroyed |= set(fault.targets)
        self.cluster.destroy_nodes(fault.targets)
        self._pause(_REPLACEMENT_DELAY_S)
        if self.scenario.shrink:
            self.watch.notes.active_count -= len(fault.targets) * self.scenario.ranks_per_node
        else:
            self._replace(fault)
        self._see_recovery(record, "node_lost")

    def _replace(self, fault: Fault) -> None:
        for node in fault.targets:
            self.cluster.replace_node(node, is_waiting=False)
            self.run.start_agent(node)
        self.watch.destroyed -= set(fault.targets)
        self.watch.replaced = set(fault.targets)

    def _coordinator(self, fault: Fault, record: FaultRecord) -> None:
        process = self.cluster.coordinator_process
        assert process is not None
        self.armed.unlink()
        self._kill_trainers(fault)
        self.watch.wait(
            lambda: process.poll() is not None or self._recovery_attempt(record) is not None,
            RECOVERY_DEADLINE_S,
            f"the coordinator to die at {_COORDINATOR_POINT}",
        )
        if process.poll() is None:
            raise DemoError(
                f"the recovery of rank {fault.targets} ended before the coordinator reached its fault point"
            )
        died = time.time()
        self.watch.printer.say(f"    the coordinator was killed during the recovery ({_COORDINATOR_POINT})")
        self._pause(_REPLACEMENT_DELAY_S)
        self.cluster.start_coordinator()
        self._see_recovery(record, "session_lost")
        record.detected_s, record.detected_by = died - record.injected_unix_s, "its supervisor"

    def _kill_trainers(self, fault: Fault) -> None:
        pids = self.watch.notes.pids()
        for rank in fault.targets:
            os.kill(pids[rank], signal.SIGKILL)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _see_recovery(self, record: FaultRecord, *detection: str) -> None:
        """Wait until every rank of one new world finished a step after restore(), and fill ``record``."""
        attempt = self.watch.wait(
            lambda: self._recovery_attempt(record), RECOVERY_DEADLINE_S, f"every rank to resume after {record.what}"
        )
        lines = [line for line in self.watch.notes.restored_since(record.injected_unix_s) if line is not None]
        firsts = [self.watch.notes.first_step_after(rank, line) for rank, line in enumerate(lines)]
        going = max(first["time_unix_s"] for first in firsts if first is not None)
        record.recovered_s = going - record.injected_unix_s
        steps = {line["step"] for line in lines}
        if len(steps) != 1 or len({line["attempt"] for line in lines}) != 1:
            raise DemoError(f"attempt {attempt}: ranks were restored to different states: {lines}")
        record.restored_step = lines[0]["step"]
        record.outcome, record.message = lines[0]["outcome"], lines[0]["message"]
        record.steps_lost = self._highest_step_before(lines) - lines[0]["step"]
        for rank, line in enumerate(lines):
            kind, _, detail = str(line["source"]).partition(" ")
            record.sources.append({"rank": rank, "kind": kind or "none", "detail": detail})
        self.watch.read_status()
        self._note_detection(record, *detection)
        self._note_early_rebuilds(record)

    def _recovery_attempt(self, record: FaultRecord) -> int | None:
        """The attempt with which every rank resumed since the fault, once each finished a step of it."""
        lines = self.watch.notes.restored_since(record.injected_unix_s)
        attempts = {line["attempt"] if line is not None else None for line in lines}
        if len(attempts) != 1 or None in attempts:
            return None
        if any(self.watch.notes.first_step_after(rank, line) is None for rank, line in enumerate(lines) if line):
            return None
        return int(next(attempt for attempt in attempts if attempt is not None))

    def _highest_step_before(self, lines: list[dict[str, Any]]) -> int:
        """The newest step any rank had finished when it was restored."""
        highest = lines[0]["step"]
        for rank, restored in enumerate(lines):
            history = self.watch.notes.ranks[rank]
            position = next(index for index, line in enumerate(history) if line is restored)
            for line in reversed(history[:position]):
                if line["kind"] == "restored":
                    break
                highest = max(highest, line["step"] if line["kind"] == "step" else 0)
        return int(highest)

    def _note_early_rebuilds(self, record: FaultRecord) -> None:
        """The shard of a rank whose node began empty was rebuilt, there or on a peer, while the trainers still started."""
        event = self.watch.first_event(record.injected_unix_s, "rebuild")
        empty = {self.cluster.nodes[node].name for node in self.watch.replaced}
        self.watch.replaced.clear()
        for source in record.sources:
            node = self.watch.notes.of(source["rank"], "start")[-1]["node"]
            if event is not None and node in empty and source["kind"] in ("local", "peer"):
                later = f"then {source['kind']} {source['detail']}".strip()
                source |= {"kind": "rebuild", "detail": f"{event['message']}; {later}"}

    def _note_detection(self, record: FaultRecord, *kinds: str) -> None:
        event = self.watch.first_event(record.injected_unix_s, *kinds)
        if event is not None:
            record.detected_s = float(event["time_unix_s"]) - record.injected_unix_s
            record.detected_by = str(event["message"])

    def _pause(self, seconds: float) -> None:
        """Let ``seconds`` pass while polling."""
        until = time.monotonic() + seconds
        self.watch.wait(lambda: time.monotonic() >= until, seconds + 60, "a moment to pass")
