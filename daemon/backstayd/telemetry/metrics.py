"""Every metric a daemon exports, in one place.

Base units; ``_total`` on counters only; the run is label ``training_job`` (``job/run_id``), and there is no label per
rank or step. Each daemon owns one registry.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics

_RUN = ("training_job",)


class Metrics:
    """The metrics of one daemon. A node uses those it knows about, a coordinator the others.

    Attributes:
        registry: Where they are collected; given to the HTTP server.
    """

    def __init__(self, *, role: str, version: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody asked for
        registry = self.registry = CollectorRegistry()
        build = Gauge("backstay_build_info", "Constant 1.", ("role", "version"), registry=registry)
        build.labels(role=role, version=version).set(1)

        self.corrupt = Counter(
            "backstay_corrupt", "Sources that failed verification, by what they were.", ("where",), registry=registry
        )
        self.coder_restarts = Counter(
            "backstay_coder_restarts", "Coder processes that died and were replaced.", registry=registry
        )
        self.memory_used_bytes = Gauge(
            "backstay_memory_used_bytes", "Bytes held in the memory directory.", registry=registry
        )
        self.memory_capacity_bytes = Gauge(
            "backstay_memory_capacity_bytes", "Most bytes this node may hold.", registry=registry
        )
        self.put_bytes = Counter("backstay_put_bytes", "Bytes received from peers.", registry=registry)
        self.read_bytes = Counter("backstay_read_bytes", "Bytes served to peers.", registry=registry)
        self.protect_bytes = Counter(
            "backstay_protect_bytes",
            "Bytes of protection, by what was done: data read from members, parity encoded, parity kept from an older plan.",
            ("training_job", "what"),
            registry=registry,
        )
        self.reshard_needed_bytes = Counter(
            "backstay_reshard_needed_bytes",
            "Bytes of chunks that trainers of another layout asked for here, each once, by where they were (local, remote).",
            ("training_job", "place"),
            registry=registry,
        )
        self.reshard_moved_bytes = Counter(
            "backstay_reshard_moved_bytes", "Bytes of such chunks that came over the network.", _RUN, registry=registry
        )
        self.sessions = Gauge("backstay_sessions", "Trainers attached to this node.", _RUN, registry=registry)

        self.shards_committed = Counter(
            "backstay_shards_committed", "Shards committed on this node.", _RUN, registry=registry
        )
        self.shards_abandoned = Counter(
            "backstay_shards_abandoned", "Shards skipped or given up on this node.", _RUN, registry=registry
        )
        self.snapshots_complete = Counter(
            "backstay_snapshots_complete", "Snapshots of which every shard was committed.", _RUN, registry=registry
        )
        self.snapshots_protected = Counter(
            "backstay_snapshots_protected", "Snapshots that became protected.", _RUN, registry=registry
        )
        self.snapshots_abandoned = Counter(
            "backstay_snapshots_abandoned", "Snapshots given up incomplete.", _RUN, registry=registry
        )
        self.recoveries = Counter(
            "backstay_recoveries",
            "Worlds answered, by outcome (exact, exact_older, none, refused).",
            ("training_job", "outcome"),
            registry=registry,
        )
        self.protected_step = Gauge(
            "backstay_protected_step", "Step of the newest protected snapshot.", _RUN, registry=registry
        )
        self.complete_step = Gauge(
            "backstay_complete_step", "Step of the newest complete snapshot.", _RUN, registry=registry
        )
        self.spares = Gauge(
            "backstay_spares", "Further node losses the newest kept snapshot survives now.", _RUN, registry=registry
        )
        self.protected_timestamp_seconds = Gauge(
            "backstay_protected_timestamp_seconds",
            "Unix time at which the newest snapshot became protected.",
            _RUN,
            registry=registry,
        )
        self.persisted_step = Gauge(
            "backstay_persisted_step", "Step of the newest snapshot on durable storage.", _RUN, registry=registry
        )
        self.persisted_timestamp_seconds = Gauge(
            "backstay_persisted_timestamp_seconds",
            "Unix time at which the newest snapshot on durable storage was completed.",
            _RUN,
            registry=registry,
        )
        self.persisted_size_bytes = Gauge(
            "backstay_persisted_size_bytes", "Bytes of the newest snapshot on durable storage.", _RUN, registry=registry
        )
        self.persisted_bytes = Counter(
            "backstay_persisted_bytes", "Bytes of shards this node copied to durable storage.", _RUN, registry=registry
        )
        self.storage_failures = Counter(
            "backstay_storage_failures",
            "Uploads, surveys and removals on durable storage that failed, by reason.",
            ("training_job", "reason"),
            registry=registry,
        )
        self.nodes = Gauge(
            "backstay_nodes", "Nodes known, by state (live, suspect, lost).", ("state",), registry=registry
        )

    def forget_run(self, run: str) -> None:
        """Drop the series of a run that is gone, so that a daemon that lives long does not grow."""
        for metric in (
            self.sessions,
            self.reshard_moved_bytes,
            self.shards_committed,
            self.shards_abandoned,
            self.snapshots_complete,
            self.snapshots_protected,
            self.snapshots_abandoned,
            self.protected_step,
            self.complete_step,
            self.spares,
            self.protected_timestamp_seconds,
            self.persisted_step,
            self.persisted_timestamp_seconds,
            self.persisted_size_bytes,
            self.persisted_bytes,
        ):
            metric.remove_by_labels({"training_job": run})
        self.recoveries.remove_by_labels({"training_job": run})
        self.reshard_needed_bytes.remove_by_labels({"training_job": run})
        self.protect_bytes.remove_by_labels({"training_job": run})
        self.storage_failures.remove_by_labels({"training_job": run})
