"""Clusters of light ranks with durable storage, and what a test asks of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backstay.testing import LocalCluster
from tests.kit.files import files_in
from tests.kit.light_world import Ranks

RUN = "default/durable"
LEASE_S = 1.0


def cluster_with(
    url: str,
    tmp_path: Path,
    *,
    nodes: int = 3,
    env: Mapping[str, str] | None = None,
    keep_last: int = 3,
    every_steps: int = 1,
    coordinator_env: Mapping[str, str] | None = None,
    parity: int = 1,
    **settings: object,
) -> LocalCluster:
    """A cluster that survives the loss of ``parity`` nodes, with ``url`` as durable storage."""
    chosen = {"persist_url": url, "persist_every_s": 0, "persist_every_steps": every_steps}
    chosen |= {"persist_keep_last": keep_last} | settings
    return LocalCluster(
        nodes,
        parity,
        lease_s=LEASE_S,
        env=env,
        coordinator_env=coordinator_env,
        settings=chosen,
        keep_logs=tmp_path / "logs",
    )


def storage_of(cluster: LocalCluster) -> dict[str, Any]:
    """What the coordinator says of durable storage."""
    return dict(cluster.run_status(RUN)["storage"])


def wait_persisted(cluster: LocalCluster, step: int) -> None:
    cluster.wait_until(lambda: storage_of(cluster)["step"] >= step, 60, f"step {step} to be on durable storage")


def persist(world: Ranks, *steps: int) -> None:
    """Publish these steps, each when the one before is on durable storage, and wait for the last."""
    for step in steps:
        world.publish(step)
        wait_persisted(world.cluster, step)


def dead_daemons(cluster: LocalCluster) -> list[int]:
    return [n.index for n in cluster.nodes if n.daemon is not None and n.daemon.poll() is not None]


def records_in(directory: Path) -> list[int]:
    """Steps with a completion record, by listing files."""
    return sorted(int(path.parent.name.removeprefix("step-")) for path in files_in(directory, "snapshot.json"))
