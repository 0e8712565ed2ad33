"""The Grafana dashboards as code: writes the JSON files beside this one.

    python deploy/grafana/generate.py            (needs grafana-foundation-sdk: pip install 'backstay[test]')

Expressions name only metrics that backstay exports or that deploy/prometheus/rules records; a test runs each of them against a
real Prometheus over a real cluster. Every panel has a unit and says what it shows; nothing names a scrape job or a data source.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as values
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Threshold, ThresholdsMode, VariableRefresh

HERE = Path(__file__).parent
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
JOB = 'training_job=~"$training_job"'
NODE = 'instance=~"$instance"'
RATE = "[$__rate_interval]"
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Panel:
    """One panel; ``queries`` are legend to expression. ``steps`` colour it from that value on."""

    title: str
    unit: str
    description: str
    queries: dict[str, str]
    is_stat: bool = False
    span: int = 8
    steps: tuple[tuple[float | None, str], ...] = ()
    is_stacked: bool = False


@dataclass(frozen=True)
class Board:
    name: str
    title: str
    description: str
    rows: dict[str, list[Panel]]
    variables: dict[str, str] = field(default_factory=dict)  # name to the query of its values


def per_job(function: str, metric: str, *, without: str = "instance, pod", labels: str = "") -> str:
    return f"{function} without ({without}) ({metric}{{{JOB}{labels}}})"


def rate(metric: str, selector: str, *, without: str = "instance, pod") -> str:
    return f"sum without ({without}) (rate({metric}{{{selector}}}{RATE}))"


GREEN_FROM_1 = ((None, "red"), (0, "orange"), (1, "green"))
RED_FROM_1 = ((None, "green"), (1, "red"))

OVERVIEW = Board(
    "overview",
    "backstay / overview",
    "Could each job survive the next failure, and do nodes and coordinator work?",
    {
        "Jobs": [
            Panel("Spares", "none", "Further node losses that each job survives now; 0: the next one loses its newest "
                  "snapshot, -1: there is none.", {"{{training_job}}": "training_job:backstay_spares:min"},
                  is_stat=True, steps=GREEN_FROM_1),
            Panel("Steps at risk", "none", "Steps past the newest protected snapshot: what would be computed again.",
                  {"{{training_job}}": "training_job:backstay_steps_at_risk:max"}, is_stat=True,
                  steps=((None, "green"), (10, "orange"), (100, "red"))),
            Panel("Newest protected snapshot", "dateTimeFromNow", "When the newest snapshot became protected.",
                  {"{{training_job}}": "1000 * max without (instance, pod) (backstay_protected_timestamp_seconds)"},
                  is_stat=True),
            Panel("Trainers", "none", "Trainers that nodes report, by phase.",
                  {"{{training_job}} {{phase}}": "max without (instance, pod) (backstay_trainers)"}),
            Panel("Protected snapshots", "cps", "Snapshots that became protected, per second.",
                  {"{{training_job}}": "training_job:backstay_snapshots_protected:rate5m"}),
            Panel("Recoveries", "none", "Worlds answered within the range shown, by outcome.",
                  {"{{outcome}}": "sum by (outcome) (increase(backstay_recoveries_total[$__range]))"}, is_stat=True),
        ],
        "Cluster": [
            Panel("Nodes", "none", "Nodes as the coordinator sees them.",
                  {"{{state}}": "max without (instance, pod) (backstay_nodes)"}, is_stacked=True),
            Panel("Nodes with a coordinator", "percentunit", "Part of the nodes that the coordinator answered within a lease.",
                  {"connected": "job:backstay_coordinator_connected:ratio"}, is_stat=True,
                  steps=((None, "red"), (0.5, "orange"), (1, "green"))),
            Panel("Leaders", "none", "Coordinators that lead: one.",
                  {"leaders": "sum without (instance, pod) (backstay_coordinator_is_leader)"}, is_stat=True,
                  steps=((None, "red"), (1, "green"), (2, "red"))),
            Panel("Deciding", "bool_yes_no", "Whether the leader has heard enough nodes to decide.",
                  {"settled": "max without (instance, pod) (backstay_coordinator_settled)"}, is_stat=True,
                  steps=((None, "red"), (1, "green"))),
            Panel("Memory used", "percentunit", "Of what each node may hold.",
                  {"{{instance}}": "instance:backstay_memory_used:ratio"}),
            Panel("Corrupt sources", "none", "Shards and fragments that failed verification within the range shown; none was used.",
                  {"{{instance}} {{where}}": "increase(backstay_corrupt_total[$__range])"}, is_stat=True, steps=RED_FROM_1),
            Panel("Versions", "none", "Daemons by version; more than one only while an upgrade goes on.",
                  {"{{role}} {{version}}": "count by (role, version) (backstay_build_info)"}, is_stat=True),
            Panel("Configurations", "none", "Daemons by role and hash of their settings; one hash per role is usual.",
                  {"{{role}} {{hash}}": "count by (role, hash) (backstay_config_info)"}, is_stat=True),
            Panel("Least lease margin", "s", "How close the reports of nodes came to their lease within a minute; 0 loses a node.",
                  {"reports": "min without (instance, pod) (backstay_report_lease_margin_seconds)",
                   "lease": "max without (instance, pod, job) (backstay_lease_seconds)"}),
            Panel("Lease of the leader", "s", "How long the coordinator leads without another renewal; infinite without an election.",
                  {"{{instance}}": "backstay_coordinator_lease_margin_seconds"}),
            Panel("Draining", "none", "Nodes that are being drained.",
                  {"draining": "sum without (instance, pod) (backstay_node_draining)"}, is_stat=True),
        ],
    },
)  # fmt: skip

JOB_BOARD = Board(
    "job",
    "backstay / job",
    "One job: how well it is protected, what snapshots cost it, what became of them.",
    {
        "Protection": [
            Panel("Spares", "none", "Node losses survived now, and those that the policy asks for.",
                  {"now": "training_job:backstay_spares:min{%s}" % JOB,
                   "wanted": "training_job:backstay_spares_wanted:max{%s}" % JOB}),
            Panel("Steps", "none", "How far trainers are, and the newest complete, protected and persisted snapshot.",
                  {"trainers": per_job("max", "backstay_trainer_step"), "complete": per_job("max", "backstay_complete_step"),
                   "protected": per_job("max", "backstay_protected_step"),
                   "persisted": per_job("max", "backstay_persisted_step")}),
            Panel("Steps at risk", "none", "Steps past the newest protected snapshot.",
                  {"at risk": "training_job:backstay_steps_at_risk:max{%s}" % JOB,
                   "interval": "training_job:backstay_snapshot_interval_steps:max{%s}" % JOB}),
            Panel("Age", "s", "Since the newest snapshot became complete, protected, persisted.",
                  {"complete": f"time() - {per_job('max', 'backstay_complete_timestamp_seconds')}",
                   "protected": f"time() - {per_job('max', 'backstay_protected_timestamp_seconds')}",
                   "persisted": f"time() - {per_job('max', 'backstay_persisted_timestamp_seconds')}"}),
            Panel("From complete to protected", "s", "Mean time that a complete snapshot waits for its parity.",
                  {"mean": f"{rate('backstay_protect_seconds_sum', JOB)} / {rate('backstay_protect_seconds_count', JOB)}"}),
            Panel("Known to the coordinator since", "dateTimeFromNow", "When this coordinator first heard of the job.",
                  {"first seen": f"1000 * {per_job('max', 'backstay_first_seen_timestamp_seconds')}"}, is_stat=True),
        ],
        "Snapshots": [
            Panel("Shards by result", "cps", "What became of the shards that trainers were to store, per second.",
                  {"{{result}}": rate("backstay_shards_total", JOB)}, is_stacked=True),
            Panel("Snapshots", "cps", "Complete, protected, and given up incomplete, per second.",
                  {"complete": rate("backstay_snapshots_complete_total", JOB),
                   "protected": rate("backstay_snapshots_protected_total", JOB),
                   "abandoned": rate("backstay_snapshots_abandoned_total", JOB)}),
            Panel("Last commit by node", "dateTimeFromNow", "When a shard was committed on each node; one that stands still "
                  "keeps snapshots from becoming complete.",
                  {"{{instance}}": "1000 * backstay_committed_timestamp_seconds{%s}" % JOB}, is_stat=True),
            Panel("Newest committed step by node", "none", "Nodes that fall behind show here.",
                  {"{{instance}}": "backstay_committed_step{%s}" % JOB}),
            Panel("Trainers by node", "none", "Trainers attached to each node's daemon.",
                  {"{{instance}}": "backstay_sessions{%s}" % JOB}, is_stacked=True),
            Panel("Distrusted and disputed", "none", "Snapshots that are not restored again, and worlds whose ranks disagreed.",
                  {"distrusted": per_job("max", "backstay_distrusted_snapshots"),
                   "gates failed": f"sum without (instance, pod) (increase(backstay_gates_failed_total{{{JOB}}}[$__range]))"},
                  is_stat=True, steps=RED_FROM_1),
        ],
        "What it costs": [
            Panel("Trainers blocked", "percentunit", "Part of their time that trainers spend in snapshot() and at the fence, mean "
                  "over ranks.", {"blocked": "training_job:backstay_trainer_blocked:ratio_rate5m{%s}" % JOB}),
            Panel("Waiting for snapshots", "percentunit", "Part of its time that the slowest rank waits for slots and copying; above "
                  "5 % the interval is raised.", {"waiting": per_job("max", "backstay_snapshot_wait_ratio")}),
            Panel("Blocked by where", "s", "Seconds per second, all ranks together.",
                  {"{{where}}": rate("backstay_trainer_blocked_seconds_total", JOB)}),
            Panel("Bytes by stage", "Bps", "What goes through each stage on all nodes together.",
                  {"{{stage}}": "training_job:backstay_stage_bytes:rate5m{%s} > 0" % JOB}),
            Panel("Bytes of protection", "Bps", "Data read from members and encoded; parity kept because nothing changed.",
                  {"{{what}}": rate("backstay_protect_bytes_total", JOB)}),
            Panel("Unchanged bytes", "Bps", "Bytes of shards that were found unchanged and not copied.",
                  {"unchanged": rate("backstay_trainer_kept_bytes_total", JOB)}),
        ],
        "Durable storage": [
            Panel("Newest durable copy", "bytes", "Size of the newest snapshot on durable storage.",
                  {"size": per_job("max", "backstay_persisted_size_bytes")}, is_stat=True),
            Panel("Copied", "Bps", "Bytes that nodes write to durable storage, per second.",
                  {"written": rate("backstay_persisted_bytes_total", JOB)}),
            Panel("Operations on storage", "cps", "What was tried, and what of it failed, per second.",
                  {"tried": rate("backstay_storage_attempts_total", JOB),
                   "failed": f"sum without (instance, pod, reason) (rate(backstay_storage_failures_total{{{JOB}}}{RATE})) or "
                             f"0 * {rate('backstay_storage_attempts_total', JOB)}"}),
            Panel("Durable copies", "none", "Snapshots that came to be on durable storage within the range shown.",
                  {"copies": f"sum without (instance, pod) (increase(backstay_snapshots_persisted_total{{{JOB}}}[$__range]))"},
                  is_stat=True),
            Panel("Interval", "s", "The configured time between durable copies; 0: not by time.",
                  {"interval": "max without (instance, pod) (backstay_persist_interval_seconds)"}, is_stat=True),
            Panel("Interval in steps", "none", "The configured steps between durable copies; 0: not by steps.",
                  {"interval": "max without (instance, pod) (backstay_persist_interval_steps)"}, is_stat=True),
        ],
    },
    {"training_job": "label_values(backstay_spares, training_job)"},
)  # fmt: skip

NODE_BOARD = Board(
    "node",
    "backstay / node",
    "One machine: its memory, the work of its coders, its links.",
    {
        "Memory": [
            Panel("Memory by use", "bytes", "Shards and parity are snapshots; slots are free or being filled; staging is what a "
                  "restore brought.", {"{{use}}": "sum by (use) (backstay_memory_used_bytes{%s})" % NODE}, is_stacked=True),
            Panel("Free", "bytes", "What the tightest of quota, tmpfs and cgroup still allows.",
                  {"{{instance}}": "backstay_memory_free_bytes{%s}" % NODE}),
            Panel("Capacity and quota", "bytes", "Most that the node may hold; a quota of 0 is what tmpfs and cgroup allow.",
                  {"{{instance}} capacity": "backstay_memory_capacity_bytes{%s}" % NODE,
                   "{{instance}} quota": "backstay_memory_quota_bytes{%s}" % NODE}),
        ],
        "Work": [
            Panel("Stages, 95th percentile", "s", "Duration of each stage; only stages that ran.",
                  {"{{stage}}": f"histogram_quantile(0.95, sum by (stage, le) (rate(backstay_stage_seconds_bucket{{{NODE}}}{RATE}))) > 0"}),
            Panel("Stages, mean over the cluster", "s", "The same stages on all nodes, to compare with.",
                  {"{{stage}}": "stage:backstay_stage_seconds:mean_rate5m"}),
            Panel("Stages, 95th percentile over the cluster", "s", "The same stages on all nodes, to compare with.",
                  {"{{stage}}": "stage:backstay_stage_seconds:p95_rate5m > 0"}),
            Panel("Where coder time goes", "s", "Seconds per second by part of each stage; parts may overlap.",
                  {"{{stage}} {{part}}": f"sum by (stage, part) (rate(backstay_stage_part_seconds_total{{{NODE}}}{RATE}))"}),
            Panel("Coder jobs", "cps", "Jobs that ended, per second.",
                  {"{{stage}} {{result}}": f"sum by (stage, result) (rate(backstay_stage_runs_total{{{NODE}}}{RATE})) > 0"}),
            Panel("Bytes by stage", "Bps", "What goes through each stage on these nodes.",
                  {"{{stage}}": f"sum by (stage) (rate(backstay_stage_bytes_total{{{NODE}}}{RATE})) > 0"}),
            Panel("Peers", "Bps", "What peers read from here (sent) and put here (received).",
                  {"{{direction}}": f"sum by (direction) (rate(backstay_peer_bytes_total{{{NODE}}}{RATE}))"}),
            Panel("Coders replaced", "none", "Coder processes that died within the range shown.",
                  {"{{instance}}": "increase(backstay_coder_restarts_total{%s}[$__range])" % NODE}, is_stat=True,
                  steps=RED_FROM_1),
        ],
        "Verification": [
            Panel("Corrupt sources", "none", "What failed verification within the range shown; none was used.",
                  {"{{where}}": "sum by (where) (increase(backstay_corrupt_total{%s}[$__range]))" % NODE}, is_stat=True,
                  steps=RED_FROM_1),
            Panel("Verified", "Bps", "Bytes that coders read and verified.",
                  {"{{instance}}": f"rate(backstay_verified_bytes_total{{{NODE}}}{RATE})"}),
        ],
        "Links and process": [
            Panel("Coordinator", "bool_yes_no", "Whether the coordinator answered within a lease.",
                  {"{{instance}}": "backstay_coordinator_connected{%s}" % NODE}, is_stat=True,
                  steps=((None, "red"), (1, "green"))),
            Panel("Lease margin", "s", "Least time left of the lease when the coordinator answered, within a minute.",
                  {"{{instance}}": "backstay_node_lease_margin_seconds{%s}" % NODE}),
            Panel("Peers", "none", "Live nodes of the same jobs.", {"{{instance}}": "backstay_peers{%s}" % NODE}),
            Panel("Processor of the daemon", "percentunit", "Without its coders.",
                  {"{{instance}}": f"rate(process_cpu_seconds_total{{{NODE}}}{RATE}) and on (instance, job) backstay_build_info"}),
            Panel("Memory of the daemon", "bytes", "Resident, without its coders and without snapshots.",
                  {"{{instance}}": "process_resident_memory_bytes{%s} and on (instance, job) backstay_build_info" % NODE}),
            Panel("Open files", "none", "Of the daemon, out of how many it may have.",
                  {"{{instance}} open": "process_open_fds{%s} and on (instance, job) backstay_build_info" % NODE,
                   "{{instance}} most": "process_max_fds{%s} and on (instance, job) backstay_build_info" % NODE}),
            Panel("Certificates end in", "s", "Time until the end of each certificate in use; empty without TLS.",
                  {"{{instance}} {{certificate}}": "backstay_certificate_expiry_timestamp_seconds{%s} - time()" % NODE}),
            Panel("Running since", "dateTimeFromNow", "Start of the daemon.",
                  {"{{instance}}": "1000 * process_start_time_seconds{%s} and on (instance, job) backstay_build_info" % NODE},
                  is_stat=True),
        ],
    },
    {"instance": "label_values(backstay_coordinator_connected, instance)"},
)  # fmt: skip

RECOVERY_BOARD = Board(
    "recovery",
    "backstay / recovery",
    "What was lost when, how it came back, how long that took.",
    {
        "Outcomes": [
            Panel("Worlds that asked to restore", "none", "Within the range shown.",
                  {"{{training_job}}": f"sum by (training_job) (increase(backstay_recoveries_started_total{{{JOB}}}[$__range]))"},
                  is_stat=True),
            Panel("Outcomes", "none", "exact: the newest snapshot; exact_older: one before it; none: a new run; refused: nothing "
                  "could be restored; abandoned: a rank died meanwhile.",
                  {"{{outcome}}": f"sum by (outcome) (increase(backstay_recoveries_total{{{JOB}}}[$__range]))"}, is_stat=True),
            Panel("Farthest source", "none", "Where the shard came from that was farthest away.",
                  {"{{source}}": f"sum by (source) (increase(backstay_recoveries_total{{{JOB}}}[$__range]))"}, is_stat=True),
            Panel("Shards by source", "none", "Shards restored within the range shown.",
                  {"{{source}}": f"sum by (source) (increase(backstay_recovery_shards_total{{{JOB}}}[$__range]))"}, is_stat=True),
            Panel("Steps lost", "none", "Steps that were computed again, within the range shown.",
                  {"{{training_job}}": f"sum by (training_job) (increase(backstay_steps_lost_total{{{JOB}}}[$__range]))"},
                  is_stat=True),
            Panel("Goodput", "percentunit", "Productive part of the time since each run began.",
                  {"{{training_job}}": per_job("max", "backstay_goodput_ratio")}, is_stat=True),
            Panel("Where time went", "percentunit", "Part of the time shown: productive; down; recomputing what was lost; blocked by "
                  "snapshots.",
                  {"{{training_job}} {{part}}": rate("backstay_run_seconds_total", JOB)}, is_stacked=True),
            Panel("Set aside", "none", "Corrupt shards and fragments within the range shown.",
                  {"{{training_job}}": f"sum by (training_job) (increase(backstay_quarantined_total{{{JOB}}}[$__range]))"},
                  is_stat=True, steps=RED_FROM_1),
        ],
        "Duration": [
            Panel("Phases, mean", "s", "detect: until the loss was stated; restart: until the new world asked (not ours); decide; "
                  "stage: until every host verified its part; release.",
                  {"{{phase}}": "sum by (phase) (increase(backstay_recovery_phase_seconds_sum[$__range])) / "
                                "(sum by (phase) (increase(backstay_recovery_phase_seconds_count[$__range])) > 0)"},
                  span=12),
            Panel("Phases, 95th percentile", "s", "Over the range shown; only phases that occurred.",
                  {"{{phase}}": "histogram_quantile(0.95, sum by (phase, le) "
                                "(increase(backstay_recovery_phase_seconds_bucket[$__range]))) >= 0"}, span=12),
        ],
        "Rebuilding": [
            Panel("Rebuilds", "none", "Rebuilds of lost shards, begun and finished within the range shown.",
                  {"begun": f"sum by (training_job) (increase(backstay_rebuilds_started_total{{{JOB}}}[$__range]))",
                   "finished": f"sum by (training_job) (increase(backstay_rebuilds_finished_total{{{JOB}}}[$__range]))"},
                  is_stat=True),
            Panel("Shards rebuilt by node", "none", "Onto each node, within the range shown.",
                  {"{{instance}}": f"sum by (instance) (increase(backstay_shards_rebuilt_total{{{JOB}}}[$__range]))"},
                  is_stat=True),
            Panel("Rebuilding and fetching", "Bps", "Bytes decoded for new owners, and fetched from peers or storage.",
                  {"{{stage}}": f'sum by (stage) (rate(backstay_stage_bytes_total{{{JOB}, stage=~"rebuild|fetch"}}{RATE}))'}),
            Panel("Another layout", "Bps", "Bytes that trainers of another layout needed, by where they were, and those moved.",
                  {"needed {{place}}": f"sum by (place) (rate(backstay_reshard_needed_bytes_total{{{JOB}}}{RATE}))",
                   "moved": f"sum by (training_job) (rate(backstay_reshard_moved_bytes_total{{{JOB}}}{RATE}))"}),
            Panel("Generation", "none", "Raised with every decision and every new coordinator.",
                  {"generation": "max without (instance, pod) (backstay_generation)"}),
            Panel("Heartbeats by part of the lease", "percentunit", "Part of reports that came within so much of the lease; "
                  "all should come within half.",
                  {"{{le}}": "sum by (le) (increase(backstay_report_lease_ratio_bucket[$__range])) / ignoring (le) group_left () "
                             "sum without (instance, pod, job, le) (increase(backstay_report_lease_ratio_count[$__range]))"}),
        ],
    },
    {"training_job": "label_values(backstay_spares, training_job)"},
)  # fmt: skip

BOARDS = (OVERVIEW, JOB_BOARD, NODE_BOARD, RECOVERY_BOARD)


def build(board: Board) -> str:
    """The dashboard as JSON, equal for equal input."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(f"backstay-{board.name}")
        .description(board.description)
        .tags(["backstay"])
        .refresh("30s")
        .time("now-3h", "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for name, query in board.variables.items():
        made.with_variable(
            dashboard.QueryVariable(name)
            .label(name.replace("_", " "))
            .query(query)
            .datasource(SOURCE)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".*")
            .multi(True)
        )
    ids = iter(range(1, 1000))
    for title, panels in board.rows.items():
        made.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels:
            made.with_panel(_panel(panel, next(ids)))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def _panel(panel: Panel, number: int) -> stat.Panel | timeseries.Panel:
    made: stat.Panel | timeseries.Panel
    if panel.is_stat:
        reduce = common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)
        made = stat.Panel().reduce_options(reduce).graph_mode(values.BigValueGraphMode.NONE)
    else:
        legend = common.VizLegendOptions().show_legend(True).display_mode(values.LegendDisplayMode.LIST)
        legend = legend.placement(values.LegendPlacement.BOTTOM).calcs([])
        made = timeseries.Panel().legend(legend).fill_opacity(10)
        if panel.is_stacked:
            made.stacking(common.StackingConfig().mode(values.StackingMode.NORMAL))
    if panel.steps:
        steps = [Threshold(value=value, color=color) for value, color in panel.steps]
        made.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    made.id(number).title(panel.title).description(panel.description).unit(panel.unit).span(panel.span).height(7)
    made.datasource(SOURCE)
    for letter, (legend_format, expr) in zip(LETTERS, panel.queries.items(), strict=False):
        made.with_target(prometheus.Dataquery().ref_id(letter).expr(expr).legend_format(legend_format))
    return made


def main() -> int:
    for board in BOARDS:
        (HERE / f"{board.name}.json").write_text(build(board), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
