"""A run that is over, on real daemons: its memory is freed, and whoever restarts it is told what became of it."""

from __future__ import annotations

from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.light_world import light_world
from tests.kit.wording import says

RUN = "default/over"
LEASE_S = 1.0


def test_a_finished_run_says_so_after_restarts_of_all_daemons_and_its_name_can_be_used_again(
    new_cluster: NewCluster,
) -> None:
    cluster = new_cluster(2, 1, lease_s=LEASE_S)
    with light_world(cluster, RUN) as first:
        first.start_fresh()
        first.protect(1, 2, 3)
        first.ask_all("finish")
    for index in (0, 1):
        cluster.wait_until(
            lambda index=index: not [name for name in cluster.files(index) if name.startswith("default/")],  # type: ignore[misc]
            30,
            "the finished job's memory to be freed",
        )
    cluster.kill_coordinator()
    for index in (0, 1):
        cluster.kill_daemon(index)
        cluster.restart_daemon(index)
    cluster.start_coordinator()
    with light_world(cluster, RUN) as again:
        for answer in again.restore():
            assert answer.get("error") == "UnrecoverableError", answer
            assert says("run_finished", answer["message"], run=RUN, step=3)
            assert says("start_over", answer["message"])
    with light_world(cluster, RUN) as later:
        for answer in later.restore(allow_fresh=True):
            assert (answer.get("outcome"), answer.get("attempt")) == ("NONE", 2), answer
        later.protect(1)
    with light_world(cluster, f"{RUN}s") as other:
        for answer in other.restore():
            assert says("similar_names", answer["message"], name=RUN)
