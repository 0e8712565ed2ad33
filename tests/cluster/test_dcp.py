"""dcp.save, async_save and load into memory and out of it: real DCP, real FSDP2, real daemons."""

from __future__ import annotations

from pathlib import Path

from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from tests.kit.dcp_world import World

LEASE_S = 1.0
RUN = "default/dcp"


def _wait_protected(cluster: LocalCluster, step: int) -> None:
    cluster.wait_until(lambda: cluster.run_status(RUN)["protected_step"] >= step, 90, f"step {step} to be protected")


def test_what_four_ranks_saved_is_loaded_by_four_by_two_and_by_one(new_cluster: NewCluster, tmp_path: Path) -> None:
    """Each world reads another cut straight from memory, and saves the next step in its own."""
    cluster = new_cluster(2, 1, lease_s=LEASE_S)
    first = World(cluster, tmp_path, [["begin"], ["save", 10], ["save", 20], ["complete", 20]], ranks=4).join()
    assert first.all("begun", "step") == [[None]] * 4
    assert first.all("complete", "is_complete") == [[True]] * 4
    for ranks, step in ((4, 20), (2, 30), (1, 40)):
        do = [["begin"], ["load", step], ["save", step + 10], ["complete", step + 10]]
        world = World(cluster, tmp_path, do, ranks=ranks).join()
        assert world.all("begun", "step") == [[step]] * ranks
        assert world.all("loaded", "differing") == [[[]]] * ranks


def test_branches_of_different_ranks_are_nested_again_where_nothing_is_known_of_them(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    cluster = new_cluster(1, 0, lease_s=LEASE_S)
    World(cluster, tmp_path, [["begin"], ["save_own", 3], ["complete", 3]], ranks=2).join()
    alone = World(cluster, tmp_path, [["begin"], ["load_without_template"]], ranks=1).join()
    layers = {str(rank): [[float(rank)] * 3, {"rank": rank}] for rank in (0, 1)}
    assert alone.all("loaded_free", "state") == [[{"layers": layers, "step": 3}]]


def test_async_save_keeps_what_was_staged_though_the_tensors_change_at_once(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    """Complaint 4: async_save writes tensors that are changed after the call."""
    cluster = new_cluster(2, 1, lease_s=LEASE_S)
    do = [["begin"], *(["async_save", step] for step in (1, 2, 3, 4)), ["complete", 4]]
    World(cluster, tmp_path, do, ranks=2).join()
    second = World(cluster, tmp_path, [["begin"], ["load", 4], ["finish"]], ranks=2).join()
    assert second.all("loaded", "differing") == [[[]], [[]]]


def test_a_node_lost_between_save_and_load_costs_nothing(new_cluster: NewCluster, tmp_path: Path) -> None:
    """Three ranks on three nodes saved; one node is gone with its memory, and two ranks go on."""
    cluster = new_cluster(3, 1, lease_s=LEASE_S)
    World(cluster, tmp_path, [["begin"], ["save", 5], ["complete", 5]], ranks=3).join()
    _wait_protected(cluster, 5)
    cluster.destroy_node(1)
    assert not cluster.nodes[1].directory.exists()
    world = World(cluster, tmp_path, [["begin"], ["load", 5]], ranks=2).join()
    assert world.all("loaded", "differing") == [[[]], [[]]]


def test_a_save_that_fails_on_one_rank_hangs_nobody(new_cluster: NewCluster, tmp_path: Path) -> None:
    """Complaint 9. One rank's daemon is dead: with collectives all ranks hear of it, without them the other rank is done."""
    cluster = new_cluster(2, 1, lease_s=LEASE_S)
    dead, back = tmp_path / "dead", tmp_path / "back"
    do = [
        ["begin"], ["save", 1], ["complete", 1], ["barrier"], ["await_file", str(dead)], ["try_save", 2],
        ["await_file", str(back)], ["save_until_kept", 3],
    ]  # fmt: skip
    world = World(cluster, tmp_path, do, ranks=2)
    cluster.wait_until(
        lambda: all(world.lines(rank, "complete") for rank in (0, 1)), 120, "step 1 to be complete at both ranks"
    )
    cluster.kill_daemon(1)
    dead.touch()
    cluster.wait_until(lambda: all(world.lines(rank, "refused") for rank in (0, 1)), 120, "both ranks to be told")
    cluster.restart_daemon(1)
    cluster.wait_live()
    back.touch()
    world.join()
    first = {reasons[0] for reasons in world.all("refused", "reason")}
    assert first <= {"no_daemon", "daemon_gone"}, first
    assert world.all("complete", "is_complete") == [[True, True], [True, True]], world.all("refused", "error")


def test_a_rank_without_a_daemon_goes_on_training_and_the_other_saves_without_it(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    """Not strict, and without collectives: what cannot be kept is a warning at that rank alone."""
    cluster = new_cluster(2, 1, lease_s=LEASE_S)
    dead = tmp_path / "dead"
    do = [["begin"], ["save_alone", 1], ["complete", 1], ["barrier"], ["await_file", str(dead)], ["save_alone", 2]]
    world = World(cluster, tmp_path, do, ranks=2, strict=False)
    cluster.wait_until(
        lambda: all(world.lines(rank, "complete") for rank in (0, 1)), 120, "step 1 to be complete at both ranks"
    )
    cluster.kill_daemon(1)
    dead.touch()
    world.join()
    assert world.all("saved", "committed") == [[True, True], [True, False]]
    assert "daemon" in world.lines(1, "saved")[1]["problem"]
    cluster.restart_daemon(1)
    cluster.wait_live()
    again = World(cluster, tmp_path, [["begin"], ["load", 1]], ranks=2).join()
    assert again.all("begun", "step") == [[1], [1]], "step 2 is not whole, so nobody restores it"
    assert again.all("loaded", "differing") == [[[]], [[]]]
