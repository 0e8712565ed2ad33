"""Metrics, the status document and the files themselves say the same: what was done is known exactly, by light ranks."""

from __future__ import annotations

import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from backstay.testing import LocalCluster
from backstay.testing.daemons import LocalNode
from tests.kit.files import flip_byte
from tests.kit.light_world import Ranks, light_world, wait_protected

CLUSTER = {"nodes": 2, "parity": 1, "lease_s": 1.0}
RUN = "default/measured"
STEPS = 3
SNAPSHOT_S, FENCE_S = 0.25, 0.5  # what each rank says that a step cost it

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def _scrape(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Board:
    """The metrics of one daemon, waited for: gauges follow within a sixth of a lease."""

    def __init__(self, cluster: LocalCluster, port: int) -> None:
        self._cluster = cluster
        self._port = port

    def value(self, name: str, **labels: str) -> float | None:
        return _scrape(self._port).get((f"backstay_{name}", tuple(sorted(labels.items()))))

    def of_run(self, name: str, **labels: str) -> float | None:
        return self.value(name, training_job=RUN, **labels)

    def expect(self, expected: float | None, name: str, **labels: str) -> None:
        """The series of the run comes to ``expected``."""
        self._wait(lambda: self.of_run(name, **labels), expected, name, labels)

    def expect_own(self, expected: float, name: str, **labels: str) -> None:
        """The series without a run comes to ``expected``."""
        self._wait(lambda: self.value(name, **labels), expected, name, labels)

    def _wait(self, look: object, expected: float | None, name: str, labels: dict[str, str]) -> None:
        assert callable(look)
        seen: list[float | None] = [None]

        def is_there() -> bool:
            seen[0] = look()
            return seen[0] == expected or (seen[0] is not None and seen[0] == pytest.approx(expected))

        try:
            self._cluster.wait_until(is_there, 20, f"{name}{labels} to be {expected}")
        except AssertionError as error:
            raise AssertionError(f"{name}{labels} is {seen[0]}, not {expected}") from error


def _coordinator(cluster: LocalCluster) -> Board:
    return Board(cluster, cluster.coordinator_http_port)


def _nodes(cluster: LocalCluster) -> list[Board]:
    return [Board(cluster, node.http_port) for node in cluster.nodes]


def _bytes_by_use(node: LocalNode) -> dict[str, int]:
    """The node's files by what they are, from a listing alone."""
    found = {"shards": 0, "parity": 0, "slots": 0, "staging": 0}
    for name, size in node.files().items():
        path = Path(name)
        if path.suffix == ".json":
            continue
        if path.parent.name.startswith("step-"):
            found["shards"] += size
        elif path.parent.name in ("parity", "slots", "staging"):
            found[path.parent.name] += size
    return found


def _newest_whole_step(cluster: LocalCluster) -> int:
    """The newest step of which every rank's shard and its manifest lie somewhere, from listings alone."""
    ranks: dict[str, set[str]] = {}
    for node in cluster.nodes:
        names = set(node.files())
        for name in names:
            if name.endswith(".manifest.json") and name.replace(".manifest.json", ".safetensors") in names:
                ranks.setdefault(Path(name).parent.name, set()).add(Path(name).name)
    return max(int(step.removeprefix("step-")) for step, found in ranks.items() if len(found) == len(cluster.nodes))


def _train(cluster: LocalCluster, world: Ranks) -> None:
    for step in range(1, STEPS + 1):
        for rank in world.ranks:
            rank.ask("reserve", step=step)
            rank.ask("fill", step=step)
            rank.ask("commit", step=step, snapshot_s=SNAPSHOT_S, fence_s=FENCE_S)
        wait_protected(cluster, RUN, step)


def test_what_was_done_is_what_metrics_status_and_files_say(cluster: LocalCluster) -> None:
    coordinator, nodes = _coordinator(cluster), _nodes(cluster)
    with light_world(cluster, RUN) as world:
        world.start_fresh()
        _train(cluster, world)
        _after_training(cluster, coordinator, nodes, size_bytes=_slot_size(cluster))
        world.ask_all("reserve", step=STEPS + 1)
        world.kill()
    for node in nodes:
        node.expect(1, "shards_total", result="lost")
        node.expect(0, "sessions")
    coordinator.expect(0, "trainers", phase="training")
    (newest,) = cluster.nodes[1].memory_dir.rglob(f"step-{STEPS:08d}/rank-*.safetensors")
    flip_byte(newest)
    with light_world(cluster, RUN) as world:
        assert {(answer["outcome"], answer["step"]) for answer in world.restore()} == {("EXACT", STEPS)}
        _after_recovery(cluster, coordinator, nodes)
        cluster.destroy_node(1)
        coordinator.expect_own(1, "nodes", state="lost")
        coordinator.expect(0, "spares")
        assert cluster.run_status(RUN)["spares"] == 0
        assert coordinator.of_run("spares_wanted") == 1


def _slot_size(cluster: LocalCluster) -> int:
    (size,) = {s["size_bytes"] for node in (0, 1) for s in cluster.node_status(node)["runs"][0]["shards"]}
    return int(size)


def _after_training(cluster: LocalCluster, coordinator: Board, nodes: list[Board], *, size_bytes: int) -> None:
    for index, node in enumerate(nodes):
        node.expect(STEPS, "shards_total", result="committed")
        for result in ("skipped", "torn", "refused", "lost"):
            assert node.of_run("shards_total", result=result) == 0
        node.expect(STEPS, "committed_step")
        node.expect(1, "sessions")
        node.expect(STEPS * SNAPSHOT_S, "trainer_blocked_seconds_total", where="snapshot")
        node.expect(STEPS * FENCE_S, "trainer_blocked_seconds_total", where="fence")
        node.expect(STEPS * size_bytes, "stage_bytes_total", stage="commit")
        cluster.wait_until(
            lambda node=node, index=index: (
                {  # type: ignore[misc]
                    use: node.value("memory_used_bytes", use=use) for use in ("shards", "parity", "slots", "staging")
                }
                == _bytes_by_use(cluster.nodes[index])
            ),
            20,
            "memory by use to be what lies there",
        )
        assert node.value("memory_capacity_bytes") == cluster.node_status(index)["memory"]["capacity_bytes"]
        node.expect_own(1, "coordinator_connected")
        node.expect_own(1, "peers")
    status = cluster.run_status(RUN)
    assert _newest_whole_step(cluster) == STEPS == status["complete_step"] == status["protected_step"]
    for name in ("complete_step", "protected_step", "trainer_step"):
        coordinator.expect(STEPS, name)
    coordinator.expect(STEPS, "snapshots_complete_total")
    coordinator.expect(STEPS, "snapshots_protected_total")
    coordinator.expect(STEPS, "protect_seconds_count")
    coordinator.expect(status["spares"], "spares")
    coordinator.expect(2, "trainers", phase="training")
    coordinator.expect(1, "recoveries_started_total")
    coordinator.expect(1, "recoveries_total", source="none", outcome="none")
    coordinator.expect(0, "persisted_step")
    coordinator.expect_own(2, "nodes", state="live")
    protected_s = coordinator.of_run("protected_timestamp_seconds")
    complete_s = coordinator.of_run("complete_timestamp_seconds")
    assert protected_s is not None
    assert complete_s is not None
    assert complete_s <= protected_s <= cluster.status()["time_unix_s"]


def _after_recovery(cluster: LocalCluster, coordinator: Board, nodes: list[Board]) -> None:
    assert sum(node.value("corrupt_total", where="shard") or 0 for node in nodes) == 1
    nodes[1].expect_own(1, "corrupt_total", where="shard")
    assert cluster.node_status(1)["corrupt_count"] == 1
    nodes[1].expect(1, "shards_rebuilt_total")
    coordinator.expect(1, "quarantined_total")
    coordinator.expect(2, "recoveries_started_total")
    coordinator.expect(1, "recoveries_total", source="rebuild", outcome="exact")
    coordinator.expect(1, "recovery_shards_total", source="local")
    coordinator.expect(1, "recovery_shards_total", source="rebuild")
    coordinator.expect(1, "rebuilds_finished_total")
    lost = cluster.run_status(RUN)["ledger"]["steps_lost"]
    coordinator.expect(lost, "steps_lost_total")
    for phase in ("detect", "restart", "stage", "release"):
        assert (coordinator.value("recovery_phase_seconds_count", phase=phase) or 0) >= 1, phase


def test_runs_that_end_while_coders_are_at_work_for_them_leave_neither_files_nor_series(cluster: LocalCluster) -> None:
    cluster.replace_node(1)
    cluster.wait_live()
    board = _coordinator(cluster)
    runs = [f"default/short-{number}" for number in range(6)]
    for run in runs:
        with light_world(cluster, run) as world:
            world.start_fresh()
            world.publish(1)
            if run == runs[0]:
                cluster.wait_until(lambda: _has_run(board, runs[0]), 20, "the run to be exported")
            world.ask_all("finish")

    def left() -> list[str]:
        known = [run["run"] for run in cluster.status()["runs"]]
        files = [file for node in cluster.nodes for file in node.files()]
        series = [run for run in runs for board in (_coordinator(cluster), *_nodes(cluster)) if _has_run(board, run)]
        return [name for name in (*known, *files, *series) if "default/short-" in name]

    cluster.wait_until(lambda: not left(), 30, "everything of them to go")


def _has_run(board: Board, run: str) -> bool:
    return any(dict(labels).get("training_job") == run for _, labels in _scrape(board._port))


def test_a_rank_that_waits_for_snapshots_shows_and_has_all_ranks_take_fewer(cluster: LocalCluster) -> None:
    run, step, intervals = "default/waits", 0, [1, 1]
    deadline = time.monotonic() + 60
    with light_world(cluster, run) as world:
        world.start_fresh()
        while intervals != [2, 2]:
            assert time.monotonic() < deadline, f"the interval is still {intervals} at step {step}"
            step += 1
            for rank in world.ranks:
                waited_s = 0.5 if rank.rank == 1 else 0.0
                rank.ask("reserve", step=step)
                rank.ask("fill", step=step)
                answer = rank.ask("commit", step=step, fence_s=waited_s, waited_s=waited_s)
                intervals[rank.rank] = answer["interval_steps"]
            wait_protected(cluster, run, step)
        status = cluster.run_status(run)
        assert 0.05 < status["wait_ratio"] <= 1
        labels = (("training_job", run),)
        assert _scrape(cluster.coordinator_http_port)["backstay_snapshot_wait_ratio", labels] > 0.05
        said = [event["message"] for event in cluster.status()["timeline"] if event["kind"] == "interval_raised"]
        assert any("rank 1" in message for message in said), said
