"""The test's side of light ranks: starts them on a cluster's nodes, talks to them, freezes them, ends them."""

from __future__ import annotations

import hashlib
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backstay.ids import new_incarnation
from backstay.testing import LocalCluster
from backstay.testing.cluster import process_environment
from backstay.testing.command_process import CommandProcess
from backstay.testing.daemons import WORK_ROLE
from backstay.testing.light_rank import content_of, digest_of_chunks, layout_of
from tests.kit import older_release

SIZE_BYTES = 3 * 256 * 1024 + 1000


class Rank(CommandProcess):
    """One light rank process on one node; of the release in ``older`` if that is given."""

    def __init__(
        self,
        cluster: LocalCluster,
        node_index: int,
        *,
        run: str,
        rank: int,
        world_size: int,
        size_bytes: int = SIZE_BYTES,
        older: Path | None = None,
        uid: int | None = None,
    ) -> None:
        node = cluster.nodes[node_index]
        self.rank = rank
        self.size_bytes = size_bytes
        program = ["-m", "backstay.testing.light_rank"] if older is None else [str(older / older_release.LIGHT_RANK)]
        environment = process_environment() | cluster.keeper.marks(node=node.name, role=WORK_ROLE)
        environment |= {"PYTHONPATH": older_release.python_path(older)} if older is not None else {}
        environment |= {"LIGHT_RANK_UID": str(uid)} if uid is not None else {}
        super().__init__(
            [sys.executable, *program, str(node.socket), run, str(rank), str(world_size), str(size_bytes)],
            name=f"rank {rank}",
            environment=environment,
            log=cluster.keeper.log_dir / f"rank-{rank}-{new_incarnation()}.log",
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send and receive; an error answer fails the test."""
        self.send(do, **arguments)
        answer = self.receive()
        assert "error" not in answer, f"rank {self.rank}, {do}: {answer}"
        return answer

    def ask_refused(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send and receive; anything but an error answer fails the test."""
        self.send(do, **arguments)
        answer = self.receive()
        assert "error" in answer, f"rank {self.rank}, {do} was not refused: {answer}"
        return answer

    def expected(self, seed: str, step: int) -> str:
        """SHA-256 of the shard file this rank writes for ``seed`` and ``step``."""
        return hashlib.sha256(content_of(layout_of(self.rank, self.size_bytes), seed, step, self.rank)).hexdigest()

    def expected_chunks(self, seed: str, step: int, rank: int, runs: list[list[int]]) -> str:
        """SHA-256 of these chunks (first, count) of what ``rank`` wrote."""
        return digest_of_chunks(content_of(layout_of(rank, self.size_bytes), seed, step, rank), runs)

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        super().close()


class Ranks:
    """The light ranks of one world."""

    def __init__(self, cluster: LocalCluster, run: str, ranks: Sequence[Rank], world_id: str) -> None:
        self.cluster, self.run = cluster, run
        self.ranks = list(ranks)
        self.world_id = world_id

    def attach(self, **arguments: Any) -> None:
        for rank in self.ranks:
            rank.ask("attach", world_id=self.world_id, **arguments)

    def ask_all(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        for rank in self.ranks:
            rank.send(do, **arguments)
        return self.answers()

    def restore(self, **arguments: Any) -> list[dict[str, Any]]:
        """Attach and restore on all ranks; the answers in rank order, errors included."""
        self.attach()
        return self.ask_all("restore", **arguments)

    def begin_restore(self) -> None:
        """Attach and ask to restore on all ranks, and wait for no answer; see :meth:`answers`."""
        self.attach()
        for rank in self.ranks:
            rank.send("restore")

    def answers(self) -> list[dict[str, Any]]:
        """The next answer of each rank, errors included."""
        return [rank.receive() for rank in self.ranks]

    def start_fresh(self, **arguments: Any) -> None:
        """Attach with ``arguments`` and restore where nothing was kept; anything but NONE on every rank fails the test."""
        self.attach(**arguments)
        for answer in self.ask_all("restore"):
            assert answer.get("outcome") == "NONE", answer

    def publish(self, step: int, seed: str = "") -> None:
        for answer in self.ask_all("publish", step=step, seed=seed):
            assert "digest" in answer, f"step {step} was not committed: {answer}"

    def protect(self, *steps: int, seed: str = "") -> None:
        """Publish these steps, each when the one before is protected, and wait for the last."""
        for step in steps:
            self.publish(step, seed)
            wait_protected(self.cluster, self.run, step)

    def restore_exactly(self, step: int, **expected: str) -> list[dict[str, Any]]:
        """Attach and restore; see :meth:`check_restored`."""
        return self.check_restored(self.restore(), step, **expected)

    def check_restored(
        self, answers: list[dict[str, Any]], step: int, *, outcome: str = "EXACT", seed: str = "", source: str = ""
    ) -> list[dict[str, Any]]:
        """Every rank got ``step`` with the very bytes that a rank of its number wrote; the answers.

        ``outcome``, ``source``: of all ranks; "": any.
        """
        for rank, answer in zip(self.ranks, answers, strict=True):
            assert answer.get("step") == step, answer
            assert outcome in ("", answer["outcome"]), answer
            shard = answer["shards"][str(rank.rank)]
            assert shard["sha256"] == rank.expected(seed, step), answer
            assert source in ("", shard["source"]), answer
        return answers

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


@contextmanager
def light_world(
    cluster: LocalCluster,
    run: str,
    *,
    nodes: Sequence[int] | None = None,
    size_bytes: int = SIZE_BYTES,
    older: Mapping[int, Path] | None = None,
    uid: int | None = None,
) -> Iterator[Ranks]:
    """A world with rank r on node ``nodes[r]`` (default: one on each node); nothing is attached yet.

    ``older``: ranks of another release, and where its sources are. ``uid``: the user that the ranks become, who must
    reach the nodes' sockets; None: this one.
    """
    places = list(range(len(cluster.nodes))) if nodes is None else list(nodes)
    ranks = Ranks(
        cluster,
        run,
        [
            Rank(
                cluster,
                node,
                run=run,
                rank=rank,
                world_size=len(places),
                size_bytes=size_bytes,
                older=(older or {}).get(rank),
                uid=uid,
            )
            for rank, node in enumerate(places)
        ],
        new_incarnation(),
    )
    try:
        yield ranks
    finally:
        ranks.close()


def wait_protected(cluster: LocalCluster, run: str, step: int, *, deadline_s: float = 60.0) -> None:
    cluster.wait_until(
        lambda: cluster.run_status(run)["protected_step"] >= step,
        deadline_s=deadline_s,
        why=f"step {step} of {run} to be protected",
    )
