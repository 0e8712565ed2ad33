"""What this node tells: the report to the coordinator and the status document for people. Changes nothing."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from backstay.format import json_records
from backstayd.core.messages.report import NodeReport, RunReport
from backstayd.node.node_state import NodeContext
from backstayd.node.reconcile import actions
from backstayd.node.reconcile.durable import Storing
from backstayd.node.reconcile.reconciler import Reconciler
from backstayd.node.trainers.sessions import Sessions
from backstayd.store.index import UNKNOWN_UID, RunIndex


class Reporter:
    """Makes reports from store, sessions and tasks; each has the next sequence number."""

    def __init__(self, context: NodeContext, sessions: Sessions, reconciler: Reconciler, storing: Storing) -> None:
        self._context = context
        self._sessions = sessions
        self._reconciler = reconciler
        self._storing = storing
        self._sequence = itertools.count(1)

    def report(self) -> NodeReport:
        """The whole truth of this node now."""
        store = self._context.store
        runs = sorted(set(store.runs) | {session.run for session in self._sessions})
        return NodeReport(
            node=self._context.identity,
            sequence=next(self._sequence),
            generation=store.generation,
            runs=tuple(self._run_report(run) for run in runs),
            capacity_bytes=store.capacity_bytes,
            used_bytes=store.used_bytes,
            corrupt_count=store.corrupt_count,
            is_draining=self._context.drain.is_draining,
            is_cordoned=self._context.drain.is_cordoned,
            takes_copies=True,
            takes_tombstones=True,
            tombstones=tuple(store.tombstones.values()),
        )

    def document(self) -> dict[str, Any]:
        """The status document of this node (format 1)."""
        store, context = self._context.store, self._context
        return {
            "format": 1,
            "role": "node",
            "node": json_records.to_json(context.identity),
            "time_unix_s": context.clock.unix_s(),
            "generation": json_records.to_json(store.generation),
            "coordinator": {
                "addresses": context.coordinator_address,
                **dataclasses.asdict(context.coordinator()),
                "is_connected": context.is_coordinator_connected(),
            },
            "memory": {
                "used_bytes": store.used_bytes,
                "quota_bytes": store.quota_bytes,
                "capacity_bytes": store.capacity_bytes,
                "directory": str(store.memory_dir),
            },
            "corrupt_count": store.corrupt_count,
            "is_draining": context.drain.is_draining,
            "is_cordoned": context.drain.is_cordoned,
            "foreign": [str(finding.path) for finding in store.foreign],
            "runs": [self._run_document(index) for _, index in sorted(store.runs.items())],
            "timeline": context.timeline.document(),
        }

    def _run_report(self, run: str) -> RunReport:
        index = self._context.store.runs.get(run) or RunIndex(run=run)
        view = self._reconciler.view(run)
        done, total = actions.rebuilt_bytes(view)
        storage = self._context.run_desired(run).storage
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
            staging=actions.staging_of(view),
            quarantined=(*index.quarantined.values(), *self._reconciler.bad_sources.marks(run)),
            failed_plans=tuple(self._reconciler.failed_plans.get(run, ())),
            survey=self._storing.survey(run),
            uploads=self._storing.uploads(run),
            pruned=self._storing.pruned(run),
            marked=self._storing.marked(run),
            struck=self._storing.struck(run),
            rebuilt_bytes=done,
            rebuild_total_bytes=total,
            distrusted=index.distrusted,
            failed_copies=self._reconciler.failed_copies.of(run),
            owner=str(index.owner_uid) if index.owner_uid != UNKNOWN_UID else "",
            recorded_unix_s=index.recorded_unix_s,
        )

    def _run_document(self, index: RunIndex) -> dict[str, Any]:
        context, run = self._context, index.run
        desired = context.run_desired(run)
        grants = context.store.slots.grants
        return {
            "run": run,
            "world_id": context.current_world(run),
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
            "reshard": json_records.to_json(context.offers.totals(run)),
            "uploads": [json_records.to_json(upload) for upload in self._storing.uploads(run)],
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
