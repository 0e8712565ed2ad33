"""What a node exports: its memory, its trainers, the work of its coders, its connection to the coordinator.

Series of a run count what happened on this node; the coordinator exports what holds for the whole run.
"""

from __future__ import annotations

from typing import Final

from backstayd.telemetry.metrics.daemon import DaemonMetrics

MEMORY_USES: Final = ("shards", "slots", "parity", "staging")
SHARD_RESULTS: Final = ("committed", "skipped", "torn", "refused", "lost")
JOB_STAGES: Final = ("encode", "rebuild", "fetch", "verify", "persist", "record", "survey", "prune")
STAGES: Final = ("reserve", "capture", "commit", *JOB_STAGES)


class NodeMetrics(DaemonMetrics):
    """The metrics of one node."""

    def __init__(self, *, version: str) -> None:
        super().__init__(role="node", version=version)
        self._add_memory()
        self._add_trainers()
        self._add_stages()
        self._add_sources()
        self._add_storage()
        self._add_links()

    def _add_memory(self) -> None:
        registry = self._registry
        self.memory_used_bytes = registry.gauge(
            "memory_used_bytes", "Bytes held in the memory directory, by what they are.", use=MEMORY_USES
        )
        self.memory_free_bytes = registry.gauge(
            "memory_free_bytes", "Bytes that the tightest of quota, tmpfs and cgroup still allows."
        )
        self.memory_capacity_bytes = registry.gauge(
            "memory_capacity_bytes", "Most bytes this node may hold: the smallest of quota, tmpfs and cgroup limits."
        )
        self.memory_quota_bytes = registry.gauge(
            "memory_quota_bytes", "The configured quota; 0 is what tmpfs and cgroup allow."
        )

    def _add_trainers(self) -> None:
        registry = self._registry
        self.sessions = registry.run_gauge("sessions", "Trainers attached to this node.", is_preset=True)
        self.shards = registry.run_counter(
            "shards",
            "Shards that trainers of this node were to store, by what became of them: committed; skipped, no slot was "
            "free in time; torn, the capture was given up; refused, it did not fit its announcement; lost, the trainer "
            "ended while it held a slot.",
            result=SHARD_RESULTS,
        )
        self.committed_step = registry.run_gauge("committed_step", "Newest step of which a shard was committed here.")
        self.committed_timestamp_seconds = registry.run_gauge(
            "committed_timestamp_seconds", "Unix time of the last commit of a shard here."
        )
        self.trainer_blocked_seconds = registry.run_counter(
            "trainer_blocked_seconds",
            "Time that trainers of this node spent in snapshot() and waiting at the fence, summed over ranks.",
            where=("snapshot", "fence"),
        )
        self.trainer_kept_bytes = registry.run_counter(
            "trainer_kept_bytes", "Bytes of shards that trainers found unchanged and neither copied nor hashed."
        )

    def _add_stages(self) -> None:
        registry = self._registry
        self.stage_seconds = registry.histogram(
            "stage_seconds",
            "Duration of each stage a shard or stripe goes through: reserve is the wait for a slot, capture the copy in "
            "the trainer, commit the daemon's check, the others are jobs of coders.",
            stage=STAGES,
        )
        self.stage_part_seconds = registry.counter(
            "stage_part_seconds",
            "Where the time of coder jobs went, such as read, write, put; parts of one job may overlap.",
            stage=JOB_STAGES,
            part=(),
        )
        self.stage_runs = registry.counter(
            "stage_runs", "Coder jobs that ended, by result.", stage=JOB_STAGES, result=("ok", "failed")
        )
        self.stage_bytes = registry.run_counter(
            "stage_bytes", "Bytes that went through each stage on this node.", stage=STAGES
        )
        self.protect_bytes = registry.run_counter(
            "protect_bytes",
            "Bytes of protection, by what was done: data read from members, data encoded, parity kept from an older plan.",
            what=("read", "encoded", "kept"),
        )
        self.shards_rebuilt = registry.run_counter("shards_rebuilt", "Lost shards recomputed onto this node.")
        self.coder_restarts = registry.counter("coder_restarts", "Coder processes that died and were replaced.")

    def _add_sources(self) -> None:
        registry = self._registry
        self.corrupt = registry.counter(
            "corrupt",
            "Sources that failed verification, by what they were; in_flight: right when read again.",
            where=("shard", "parity", "in_flight"),
        )
        self.verified_bytes = registry.counter(
            "verified_bytes", "Bytes that coders read and verified: what backstay_corrupt_total is out of."
        )
        self.peer_bytes = registry.counter(
            "peer_bytes", "Bytes that peers read from this node (sent) and put onto it (received).",
            direction=("sent", "received"),
        )  # fmt: skip
        self.reshard_needed_bytes = registry.run_counter(
            "reshard_needed_bytes",
            "Bytes of chunks that trainers of another layout asked for here, each once, by where they were.",
            place=("local", "remote"),
        )
        self.reshard_moved_bytes = registry.run_counter(
            "reshard_moved_bytes", "Bytes of such chunks that came over the network."
        )

    def _add_storage(self) -> None:
        registry = self._registry
        self.persisted_bytes = registry.run_counter(
            "persisted_bytes", "Bytes of shards this node copied to durable storage."
        )
        self.storage_attempts = registry.run_counter(
            "storage_attempts", "Uploads, surveys, records and removals on durable storage that were tried."
        )
        self.storage_failures = registry.run_counter(
            "storage_failures", "Those of backstay_storage_attempts_total that failed, by reason.", reason=()
        )

    def _add_links(self) -> None:
        registry = self._registry
        self.coordinator_connected = registry.gauge(
            "coordinator_connected", "1 while the coordinator answered within the last lease."
        )
        self.node_lease_margin_seconds = registry.gauge(
            "node_lease_margin_seconds",
            "Least time that was left of the lease when the coordinator answered, over the last minute.",
        )
        self.peers = registry.gauge("peers", "Live nodes of the same runs that the coordinator names to this one.")
        self.node_draining = registry.gauge("node_draining", "1 while this node is drained.")
