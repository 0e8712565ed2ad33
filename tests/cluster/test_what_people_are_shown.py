"""Status, snapshots, explain, report, page and log, looked at all the time from a run's start to its end: all of it is so.

The truth is known here: which steps every rank has committed, whose daemon is dead, who trains.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from backstayd.core.status.verdict import Word
from tests.kit.light_world import Ranks, light_world, wait_protected
from tests.kit.onlooker import Look, Onlooker, onlooker
from tests.kit.wording import says

RUN = "default/shown"
LEASE_S = 1.5
USUAL = 3  # intervals that protection may trail training by
ALARMING = re.compile(r"UNPROTECTED|AT_RISK|DEGRADED|unrecoverable|weaker|gone")
RED = {"session_lost", "node_lost", "abandoned", "refused", "quarantined", "distrusted", "behind", "gate_failed"}


def publish(seen: Onlooker, world: Ranks, steps: range) -> None:
    for step in steps:
        world.publish(step)
        seen.trained = step


def publish_without(world: Ranks, rank: int, steps: range) -> None:
    """The other ranks train on: their snapshots cannot become complete."""
    others = [one for one in world.ranks if one.rank != rank]
    for step in steps:
        for one in others:
            one.send("publish", step=step, wait_s=0.2)
        for one in others:
            one.receive()


def red_since(look: Look, began_s: float) -> list[str]:
    return [f"{e['kind']}: {e['message']}" for e in look.events if e["kind"] in RED and e["time_unix_s"] >= began_s]


def assert_calm(looks: list[Look], *, began_s: float) -> None:
    """Nothing alarms where nothing is wrong, and what is called protected is the newest that can be."""
    protected = 0
    for look in looks:
        assert look.word in ("starting", "protected"), look.run["verdict"]
        assert not ALARMING.search(look.texts), look.texts
        assert not says("never_complete", look.texts), look.texts
        assert look.run["complete_step"] == 0 or not says("from_scratch", look.texts), look.texts
        assert not red_since(look, began_s)
        assert not look.run["ledger"] or look.run["ledger"]["interruption_count"] == 0
        assert look.run["protected_step"] >= protected, "protected goes back"
        protected = look.run["protected_step"]
        if look.word == "protected":
            assert look.trained - protected <= USUAL, "green although newer steps are not protected"
            assert look.run["verdict"]["survives"] == 1
    assert looks[-1].word == "protected"


def assert_behind(seen: Onlooker, *, held: int, dead_s: float) -> None:
    """A dead daemon is shown as what it is: steps that nobody holds; not as the end of training."""
    looks = seen.of("daemon dead")
    late = [look for look in looks if look.run["behind"]]
    assert late, "654 steps were green once"
    first = looks.index(late[0])
    for look in looks[first:]:
        assert look.word in ("behind", Word.AT_RISK), look.run["verdict"]
        assert says("none_protected_since", look.run["verdict"]["reason"], step=held)
        assert says("restart_would_repeat", look.texts)
        assert look.run["behind"]["steps"] <= seen.trained - held
    for look in looks:
        assert not look.run["ledger"]["is_interrupted"], "training goes on without its daemon"
        assert look.run["ledger"]["down_s"] == 0
        assert look.run["explain"]["step"] == held
        assert not says("from_scratch", look.texts)
    assert looks[-1].run["behind"]["seconds"] > dead_s - 3 * LEASE_S


def log_lines(cluster: LocalCluster, offset: int) -> tuple[list[str], int]:
    """What the coordinator has logged since, and how much it has logged."""
    text = Path(cluster.keeper.log_dir / "coordinator.log").read_text()
    return text[offset:].splitlines(), len(text)


def test_what_people_are_shown_is_so_through_the_whole_life_of_a_run(new_cluster: NewCluster) -> None:
    cluster = new_cluster(4, 1, lease_s=LEASE_S)
    with onlooker(cluster, RUN) as seen:
        with light_world(cluster, RUN) as world:
            began_s = time.time()
            world.start_fresh()
            _, logged = log_lines(cluster, 0)
            seen.phase = "healthy"
            publish(seen, world, range(1, 41))
            wait_protected(cluster, RUN, 40)
            lines, logged = log_lines(cluster, logged)
            assert not [line for line in lines if " WARNING " in line or " ERROR " in line]

            seen.phase = ""
            cluster.kill_coordinator()
            cluster.start_coordinator()
            cluster.wait_until(lambda: cluster.run_status(RUN)["protected_step"] == 40, 30, "the next one to know it")
            seen.phase = "after a failover"
            publish(seen, world, range(41, 51))
            wait_protected(cluster, RUN, 50)

            seen.phase = "daemon dead"
            cluster.kill_daemon(2)
            dead_s = time.monotonic()
            seen.trained = 10**6
            step = 51
            while time.monotonic() - dead_s < 5 * LEASE_S:
                publish_without(world, 2, range(step, step + 5))
                step += 5
            seen.phase, seen.trained = "", step
            dead_for_s = time.monotonic() - dead_s
            cluster.restart_daemon(2)
        assert_calm(seen.of("healthy"), began_s=began_s)
        assert_calm(seen.of("after a failover"), began_s=began_s)
        assert_behind(seen, held=50, dead_s=dead_for_s)

        with light_world(cluster, RUN) as world:
            assert {answer["step"] for answer in world.restore()} == {50}
            publish(seen, world, range(51, 56))
            wait_protected(cluster, RUN, 55)
            world.ranks[3].kill()
            cluster.destroy_node(3)
        cluster.replace_node(3)
        with light_world(cluster, RUN) as world:
            assert {answer["step"] for answer in world.restore()} == {55}
            cluster.wait_until(lambda: cluster.run_status(RUN)["verdict"]["word"] == "protected", 30, "repair")
            (_, entry) = cluster.run_status(RUN)["ledger"]["interruptions"]
            assert (entry["cause"], entry["base_step"], entry["steps_lost"]) == ("node_lost", 55, 0)
            publish(seen, world, range(56, 66))
            wait_protected(cluster, RUN, 65)
            ended_s = time.time()
            _, logged = log_lines(cluster, 0)
            seen.phase = "normal end"
            cluster.wait_until(lambda: seen.looks[-1].phase == seen.phase, 30, "a look before the ranks finish")
            for rank in world.ranks:
                rank.ask("finish")
            for look in cluster.status()["runs"]:
                assert look["verdict"]["word"] in ("protected", "ending", "ended"), look["verdict"]
        cluster.wait_until(
            lambda: not any(run["snapshots"] for run in cluster.status()["runs"]), 30, "its memory to be freed"
        )
        lines, _ = log_lines(cluster, logged)
        assert not [line for line in lines if " WARNING " in line or " ERROR " in line]
        events = cluster.status()["timeline"]
        assert not [event for event in events if event["kind"] in RED and event["time_unix_s"] >= ended_s]
    for look in seen.of("normal end"):
        assert look.word in ("protected", "ending", "ended"), look.run["verdict"]
        assert not ALARMING.search(look.texts), look.texts
        assert not says("never_complete", look.texts), look.texts
