"""What the coordinator exports: how well each run is protected, its recoveries, the nodes that report to it.

Only the leader has series of runs; a standby has none, so that nothing is counted twice.
"""

from __future__ import annotations

from typing import Final

from backstayd.telemetry.metrics.daemon import DaemonMetrics

PHASES: Final = ("attached", "restoring", "training", "ended")
SOURCES: Final = ("local", "peer", "rebuild", "persisted", "none")
OUTCOMES: Final = ("exact", "exact_older", "none", "refused", "abandoned")
RECOVERY_PHASES: Final = ("detect", "restart", "decide", "stage", "release")
RUN_PARTS: Final = ("productive", "down", "recompute", "blocked")
RATIO_BUCKETS: Final = (0.2, 0.35, 0.5, 0.75, 1.0)


class CoordinatorMetrics(DaemonMetrics):
    """The metrics of one coordinator."""

    def __init__(self, *, version: str) -> None:
        super().__init__(role="coordinator", version=version)
        self._add_cluster()
        self._add_protection()
        self._add_snapshots()
        self._add_storage()
        self._add_recoveries()

    def _add_cluster(self) -> None:
        registry = self._registry
        self.coordinator_is_leader = registry.gauge(
            "coordinator_is_leader", "1 on the coordinator that leads; a single one always does."
        )
        self.coordinator_lease_margin_seconds = registry.gauge(
            "coordinator_lease_margin_seconds",
            "How long this coordinator leads without another renewal: 0 on a standby, infinite without an election.",
        )
        self.coordinator_settled = registry.gauge(
            "coordinator_settled", "1 once enough nodes have reported for decisions to be made."
        )
        self.generation = registry.gauge("generation", "The generation that grants and decisions carry.")
        self.nodes = registry.gauge(
            "nodes", "Nodes known, by state: lost is silent for a lease, suspect for half of one.",
            state=("live", "suspect", "lost"),
        )  # fmt: skip
        self.report_lease_margin_seconds = registry.gauge(
            "report_lease_margin_seconds",
            "Least time that was left of a node's lease when its report came, over all nodes and the last minute.",
        )
        self.report_lease_ratio = registry.histogram(
            "report_lease_ratio",
            "Time between two reports of a node as a part of the lease; a sixth is usual, 1 loses the node.",
            buckets=RATIO_BUCKETS,
        )

    def _add_protection(self) -> None:
        registry = self._registry
        self.spares = registry.run_gauge(
            "spares",
            "Further node losses that the run survives now; 0: the next one loses the newest snapshot, -1: none.",
        )
        self.spares_wanted = registry.run_gauge("spares_wanted", "Node losses that the policy asks to survive.")
        self.trainers = registry.run_gauge("trainers", "Trainers that nodes report, by phase.", phase=PHASES)
        self.trainer_step = registry.run_gauge("trainer_step", "Newest step that a trainer offered to store.")
        self.complete_step = registry.run_gauge("complete_step", "Step of the newest restorable snapshot.")
        self.protected_step = registry.run_gauge(
            "protected_step", "Step of the newest snapshot that is as well protected as it can be now."
        )
        self.behind_since_timestamp_seconds = registry.run_gauge(
            "behind_since_timestamp_seconds",
            "Unix time since when training is further ahead of the newest protected step than is usual; 0: it is not.",
        )
        self.complete_timestamp_seconds = registry.run_gauge(
            "complete_timestamp_seconds", "Unix time at which this coordinator last saw a snapshot become complete."
        )
        self.protected_timestamp_seconds = registry.run_gauge(
            "protected_timestamp_seconds", "Unix time at which this coordinator last saw a snapshot become protected."
        )
        self.first_seen_timestamp_seconds = registry.run_gauge(
            "first_seen_timestamp_seconds", "Unix time of the first report of the run to this coordinator."
        )
        self.snapshot_interval_steps = registry.run_gauge(
            "snapshot_interval_steps", "One in so many steps is captured."
        )
        self.snapshot_wait_ratio = registry.run_gauge(
            "snapshot_wait_ratio",
            "Part of its time that the rank which waits longest spent waiting for slots and copying, over the last few "
            "snapshots; above 0.05 snapshots are taken less often.",
        )

    def _add_snapshots(self) -> None:
        registry = self._registry
        self.snapshots_complete = registry.run_counter(
            "snapshots_complete", "Snapshots of which every shard was committed."
        )
        self.snapshots_protected = registry.run_counter("snapshots_protected", "Snapshots that became protected.")
        self.snapshots_abandoned = registry.run_counter("snapshots_abandoned", "Snapshots given up incomplete.")
        self.protect_seconds = registry.run_summary(
            "protect_seconds", "Time from a snapshot's being complete to its being protected."
        )
        self.quarantined = registry.run_counter(
            "quarantined", "Corrupt shards and fragments that nodes quarantined, or found on a peer."
        )
        self.rebuilds_started = registry.run_counter("rebuilds_started", "Rebuilds of lost shards that were begun.")
        self.rebuilds_finished = registry.run_counter(
            "rebuilds_finished", "Rebuilds of lost shards that were finished."
        )
        self.distrusted_snapshots = registry.run_gauge(
            "distrusted_snapshots", "Snapshots that are not restored again because of what they led to.", is_preset=True
        )

    def _add_storage(self) -> None:
        registry = self._registry
        self.persist_interval_seconds = registry.gauge(
            "persist_interval_seconds", "Configured time between durable copies; 0: not by time, or no storage."
        )
        self.persist_interval_steps = registry.gauge(
            "persist_interval_steps", "Configured steps between durable copies; 0: not by steps, or no storage."
        )
        self.persisted_step = registry.run_gauge(
            "persisted_step", "Step of the newest snapshot on durable storage; 0: none.", is_preset=True
        )
        self.persisted_timestamp_seconds = registry.run_gauge(
            "persisted_timestamp_seconds", "Unix time at which the newest snapshot on durable storage was completed."
        )
        self.persisted_size_bytes = registry.run_gauge(
            "persisted_size_bytes", "Bytes of the newest snapshot on durable storage."
        )
        self.snapshots_persisted = registry.run_counter(
            "snapshots_persisted", "Snapshots that came to be on durable storage, seen by this coordinator."
        )

    def _add_recoveries(self) -> None:
        registry = self._registry
        self.recoveries_started = registry.run_counter(
            "recoveries_started", "Worlds that asked to restore: what backstay_recoveries_total is out of."
        )
        self.recoveries = registry.run_counter(
            "recoveries",
            "Worlds answered, by outcome and by the farthest source that a shard came from.",
            is_possible=lambda source, outcome: (source == "none") != outcome.startswith("exact"),
            source=SOURCES,
            outcome=OUTCOMES,
        )
        self.recovery_shards = registry.run_counter(
            "recovery_shards", "Shards that released worlds restored, by where each came from.", source=SOURCES[:-1]
        )
        self.recovery_phase_seconds = registry.histogram(
            "recovery_phase_seconds",
            "Phases of a recovery: detect, from the last report to the loss being recorded; restart, until the new "
            "world asks; decide; stage, until every host verified its part; release, until every host recorded it.",
            phase=RECOVERY_PHASES,
        )
        self.steps_lost = registry.run_counter(
            "steps_lost", "Steps that were computed again after interruptions, over the whole run: its ledger's sum."
        )
        self.run_seconds = registry.run_counter(
            "run_seconds",
            "Time since the run began, by what it went into (its ledger): productive; down, from the last report to "
            "resuming; recompute, of steps that were lost; blocked, in snapshot() and at the fence.",
            part=RUN_PARTS,
        )
        self.goodput_ratio = registry.run_gauge("goodput_ratio", "Productive part of the time since the run began.")
        self.gates_failed = registry.run_counter(
            "gates_failed", "Worlds whose ranks did not agree on what they had loaded."
        )
