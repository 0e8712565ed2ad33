"""What this node reports: to the coordinator, and for people as status document and sentences. Changes nothing."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Final

from backstay.format import json_records
from backstayd.core.messages.report import NodeReport, RunReport
from backstayd.node.node_state import NodeState
from backstayd.node.reconcile.reconciler import Reconciler
from backstayd.node.reconcile.staging import rebuilt_bytes, staging_of
from backstayd.node.trainers.sessions import Sessions
from backstayd.store.index import UNKNOWN_UID, RunIndex
from backstayd.units import format_size

MAX_NAMED_RUNS: Final = 3


class Reporter:
    """Makes reports from store, sessions and tasks; each has the next sequence number."""

    def __init__(self, node: NodeState, sessions: Sessions, reconciler: Reconciler) -> None:
        self._node = node
        self._sessions = sessions
        self._reconciler = reconciler
        self._sequence = itertools.count(1)

    def report(self) -> NodeReport:
        """The whole truth of this node now."""
        store = self._node.store
        runs = sorted(set(store.runs) | {session.run for session in self._sessions})
        return NodeReport(
            node=self._node.identity,
            sequence=next(self._sequence),
            generation=store.generation,
            runs=tuple(self._run_report(run) for run in runs),
            capacity_bytes=store.capacity_bytes,
            used_bytes=store.used_bytes,
            corrupt_count=store.corrupt_count,
            is_draining=self._node.drain.is_draining,
            is_cordoned=self._node.drain.is_cordoned,
            takes_copies=True,
            takes_tombstones=True,
            tombstones=tuple(store.tombstones.values()),
        )

    def document(self) -> dict[str, Any]:
        """The status document of this node (format 1)."""
        store, node = self._node.store, self._node
        return {
            "format": 1,
            "role": "node",
            "node": json_records.to_json(node.identity),
            "time_unix_s": node.clock.unix_s(),
            "generation": json_records.to_json(store.generation),
            "coordinator": {
                "addresses": node.coordinator,
                **dataclasses.asdict(node.link),
            },
            "memory": {
                "used_bytes": store.used_bytes,
                "quota_bytes": store.quota_bytes,
                "capacity_bytes": store.capacity_bytes,
                "directory": str(store.memory_dir),
            },
            "corrupt_count": store.corrupt_count,
            "is_draining": node.drain.is_draining,
            "is_cordoned": node.drain.is_cordoned,
            "foreign": [str(finding.path) for finding in store.foreign],
            "runs": [self._run_document(index) for _, index in sorted(store.runs.items())],
            "timeline": node.timeline.document(),
        }

    def _run_report(self, run: str) -> RunReport:
        index = self._node.store.runs.get(run) or RunIndex(run=run)
        view = self._reconciler.view(run)
        done, total = rebuilt_bytes(view)
        durable, jobs = self._reconciler.durable.of(run), self._reconciler.memory_jobs
        storage = self._node.run_desired(run).storage
        persisted_step = storage.persisted_step if storage is not None else 0
        return RunReport(
            run=run,
            sessions=tuple(
                session.record(persisted_step=persisted_step)
                for session in self._sessions.of_run(run)
                if index.owner_uid in (UNKNOWN_UID, session.uid)
            ),
            shards=tuple(held.record for _, held in sorted(index.shards.items())),
            plans=tuple(plan for _, plan in sorted(index.plans.items())),
            fragments=tuple(sorted(index.fragments, key=lambda f: (f.plan_id, f.stripe, f.index))),
            decision=index.decision,
            staging=staging_of(view),
            quarantined=(*index.quarantined.values(), *self._reconciler.bad_sources.marks(run)),
            failed_plans=tuple(jobs.failed_plans.get(run, ())),
            survey=durable.survey,
            uploads=tuple(upload for _, upload in sorted(durable.uploads.items())),
            pruned=tuple(sorted(item.key for item in durable.pruned)),
            marked=tuple(sorted(durable.marked)),
            struck=tuple(sorted(durable.struck)),
            rebuilt_bytes=done,
            rebuild_total_bytes=total,
            distrusted=index.distrusted,
            failed_copies=jobs.failed_copies.of(run),
            owner=str(index.owner_uid) if index.owner_uid != UNKNOWN_UID else "",
            recorded_unix_s=index.recorded_unix_s,
        )

    def _run_document(self, index: RunIndex) -> dict[str, Any]:
        node, run = self._node, index.run
        desired = node.run_desired(run)
        grants = node.store.slots.grants
        return {
            "run": run,
            "world_id": node.current_world(run),
            "attempt": index.decision.attempt if index.decision else 0,
            "decision_phase": desired.decision_phase.value if desired.decision else "",
            "redundancy": desired.redundancy,
            "protected_step": desired.protected_step,
            "sessions": [
                {
                    "rank": session.rank,
                    "world_id": session.world_id,
                    "phase": session.phase.value,
                    "pid": session.holder.record.pid,
                    "last_step": session.last_step,
                    "collective_timeout_s": session.collective_timeout_s,
                    "skipped_step": session.skipped_step,
                    "skip_reason": session.skip_reason,
                }
                for session in self._sessions.of_run(run)
            ],
            "shards": [json_records.to_json(held.record) for _, held in sorted(index.shards.items())],
            "fragments": [json_records.to_json(f) | {"size_bytes": size} for f, size in sorted_fragments(index)],
            "plans": sorted(index.plans),
            "reshard": json_records.to_json(self._reconciler.chunks.totals(run)),
            "uploads": [
                json_records.to_json(upload) for _, upload in sorted(self._reconciler.durable.of(run).uploads.items())
            ],
            "slots": [
                {
                    "rank": slot.rank,
                    "number": slot.number,
                    "size_bytes": slot.size_bytes,
                    "state": "granted" if slot.slot_id in grants else "free",
                }
                for _, slot in sorted(index.slots.items())
            ],
            "quarantined": [
                json_records.to_json(entry)
                for entry in (*index.quarantined.values(), *self._reconciler.bad_sources.marks(run))
            ],
        }


def sorted_fragments(index: RunIndex) -> list[tuple[Any, int]]:
    return sorted(index.fragments.items(), key=lambda item: (item[0].plan_id, item[0].stripe, item[0].index))


def link_sentence(node: NodeState) -> str:
    """Whether the coordinator is there."""
    if node.link.is_connected:
        return f"connected to the coordinator at {node.link.address}"
    return f"not connected to the coordinator at {node.coordinator}"


def ready_sentence(node: NodeState) -> str:
    """The answer of ``/readyz`` while the node serves."""
    return f"ready: memory adopted, trainers are served; {link_sentence(node)}"


def status_sentence(node: NodeState) -> str:
    """How it stands, for ``systemctl status``: memory, runs, link."""
    held = f"{format_size(node.store.used_bytes)} of {format_size(node.store.capacity_bytes)} held"
    runs = [
        f"{run.run} {run.redundancy or 'UNPROTECTED'} at step {run.protected_step}"
        for _, run in sorted(node.desired.items())
    ]
    more = [f"{len(runs) - MAX_NAMED_RUNS} more runs"] if len(runs) > MAX_NAMED_RUNS else []
    return "; ".join([held, *runs[:MAX_NAMED_RUNS], *more, link_sentence(node)])
