"""dcp.save, async_save and load into memory and out of it: real DCP, real FSDP2, real daemons."""

from __future__ import annotations

from pathlib import Path

from backstay.testing.fixtures import LocalClusterFactory
from tests.kit.dcp_world import World

LEASE_S = 1.0
RUN = "default/dcp"


def test_what_dcp_saved_comes_back_bit_for_bit_in_the_same_layout(
    local_cluster_factory: LocalClusterFactory, tmp_path: Path
) -> None:
    cluster = local_cluster_factory(2, 1, lease_s=LEASE_S)
    first = World(cluster, tmp_path, [["begin"], ["save", 10], ["save", 20], ["complete", 20]], ranks=2).join()
    assert first.all("begun", "step") == [[None], [None]]
    assert first.all("complete", "is_complete") == [[True], [True]]
    second = World(cluster, tmp_path, [["begin"], ["load", 20], ["save", 30], ["finish"]], ranks=2).join()
    assert second.all("begun", "step") == [[20], [20]]
    assert second.all("loaded", "differing") == [[[]], [[]]]


def test_async_save_keeps_what_was_staged_though_the_tensors_change_at_once(
    local_cluster_factory: LocalClusterFactory, tmp_path: Path
) -> None:
    """Complaint 4: async_save writes tensors that are changed after the call."""
    cluster = local_cluster_factory(2, 1, lease_s=LEASE_S)
    do = [["begin"], *(["async_save", step] for step in (1, 2, 3, 4)), ["complete", 4]]
    World(cluster, tmp_path, do, ranks=2).join()
    second = World(cluster, tmp_path, [["begin"], ["load", 4], ["finish"]], ranks=2).join()
    assert second.all("loaded", "differing") == [[[]], [[]]]
