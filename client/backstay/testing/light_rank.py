"""A rank without torch: speaks the local protocol by hand, so that a test can stop it between any two messages.

``python -m backstay.testing.light_rank SOCKET RUN RANK WORLD_SIZE SIZE_BYTES``, then one command a line. It starts in a moment
and needs little memory besides its slots. Its bytes are a function of (seed, step, rank), so a test can say what a restored
shard must hold without asking the product.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import socket
import sys
from dataclasses import replace
from typing import Any

from backstay.format import json_records
from backstay.format.digest import Digester
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstay.format.shard import Layout, TensorSpec, build_manifest, plan_layout
from backstay.protocol import framing, messages
from backstay.testing.command_process import serve_commands

ANSWER_DEADLINE_S = 300.0


def layout_of(rank: int, size_bytes: int) -> Layout:
    """One tensor of about ``size_bytes``."""
    return plan_layout([TensorSpec.whole(f"rank-{rank:05d}.noise", "torch.uint8", (size_bytes,))])


def write_content(target: memoryview, layout: Layout, seed: str, step: int, rank: int) -> None:
    """Fill ``target`` with the whole shard file of a step; other bytes for every seed, step and rank."""
    block = hashlib.shake_256(f"{seed}/{step}/{rank}".encode()).digest(4096) * (CHUNK_BYTES // 4096)
    target[: layout.header_bytes] = layout.header
    for begin in range(layout.header_bytes, layout.size_bytes, len(block)):
        end = min(begin + len(block), layout.size_bytes)
        target[begin:end] = block[: end - begin]


def content_of(layout: Layout, seed: str, step: int, rank: int) -> bytes:
    """What :func:`write_content` writes."""
    content = bytearray(layout.size_bytes)
    write_content(memoryview(content), layout, seed, step, rank)
    return bytes(content)


def digest_of_chunks(content: bytes, runs: list[list[int]]) -> str:
    """SHA-256 of the chunks of ``runs``, each (first, count)."""
    digest = hashlib.sha256()
    for first, count in runs:
        digest.update(content[first * CHUNK_BYTES : (first + count) * CHUNK_BYTES])
    return digest.hexdigest()


class RefusedError(Exception):
    """The daemon's Error answer."""

    def __init__(self, error: messages.Error) -> None:
        super().__init__(error.message)
        self.error_class, self.reason = error.error_class, error.reason


class LightRank:
    """One session; ``do_*`` methods are the commands."""

    def __init__(self, socket_path: str, run: str, rank: int, world_size: int, size_bytes: int) -> None:
        self.run, self.rank, self.world_size = run, rank, world_size
        self.socket_path = socket_path
        self.layout = self._layout(size_bytes)
        self.slots: dict[str, mmap.mmap] = {}
        self.reserved: messages.Reserved | None = None
        self.manifest: dict[str, Any] = {}
        self.world_id = self.boxes = ""
        self.attempt = 0
        self.offer: messages.Offer | None = None
        self.decision_id = ""
        self._message_id = 0
        self._socket: socket.socket | None = None

    def _layout(self, size_bytes: int) -> Layout:
        return layout_of(self.rank, size_bytes)

    def _connect(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_DEADLINE_S)
        self._socket.connect(self.socket_path)

    def do_hello(self) -> dict[str, Any]:
        return {"size_bytes": self.layout.size_bytes}

    def do_attach(
        self, world_id: str, attempt: int = 0, protocol: int = messages.PROTOCOL_VERSION, layout: str = ""
    ) -> dict[str, Any]:
        """Connect anew and attach."""
        if self._socket is not None:
            self._socket.close()
        self._connect()
        self.world_id = world_id
        attach = messages.Attach(
            run=self.run,
            world_id=world_id,
            rank=self.rank,
            world_size=self.world_size,
            attempt=attempt,
            protocol=protocol,
            layout=layout,
        )
        self.boxes = layout
        answer, _ = self._ask(attach)
        return {"node": answer.node, "session_id": answer.session_id}

    def do_restore(self, allow_fresh: bool = False, deadline_s: float = 60.0, staged: str = "") -> dict[str, Any]:
        """Ask for the world's decision and read every shard that comes with it, or keep the offer."""
        request = messages.Restore(
            allow_fresh=allow_fresh, deadline_s=deadline_s, world_size=self.world_size, staged=staged
        )
        answer, fds = self._ask(request)
        if isinstance(answer, messages.Offer):
            return self._take_offer(answer)
        shards = {}
        for shard in answer.shards:
            with open(fds[shard.fd_index], "rb") as file:
                shards[str(shard.rank)] = {"sha256": hashlib.sha256(file.read()).hexdigest(), "source": shard.source}
        self.attempt, self.decision_id = answer.attempt, answer.decision_id
        return {
            "outcome": answer.outcome,
            "attempt": answer.attempt,
            "step": answer.step,
            "base_attempt": answer.base_attempt,
            "message": answer.message,
            "shards": shards,
        }

    def do_open(self, run: str, step: int = 0) -> dict[str, Any]:
        """Visit a snapshot without a world, over a connection of its own."""
        if self._socket is None:
            self._connect()
        answer, _ = self._ask(messages.Open(run=run, step=step))
        return self._take_offer(answer)

    def do_fetch(self, wanted: dict[str, list[list[int]]] | None = None, deadline_s: float = 60.0) -> dict[str, Any]:
        """Have chunks fetched, ``wanted[rank]`` lists (first, count), all by default; the SHA-256 of these bytes by rank."""
        assert self.offer is not None
        manifests = [json_records.from_json(Manifest, manifest) for manifest in self.offer.manifests]
        if wanted is None:
            wanted = {str(m.rank): [[0, m.chunk_count]] for m in manifests}
        ranges = tuple(
            messages.ChunkRanges(rank=int(rank), firsts=tuple(f for f, _ in runs), counts=tuple(c for _, c in runs))
            for rank, runs in wanted.items()
        )
        request = messages.Fetch(decision_id=self.offer.decision_id, shards=ranges, deadline_s=deadline_s)
        answer, fds = self._ask(request)
        digests = {}
        for shard in answer.shards:
            with open(fds[shard.fd_index], "rb") as file:
                content = file.read()
            assert len(content) == manifests[shard.rank].size_bytes
            digests[str(shard.rank)] = digest_of_chunks(content, wanted[str(shard.rank)])
        return {"digests": digests}

    def do_staged(self, deadline_s: float = 60.0) -> dict[str, Any]:
        """Say that everything needed of the offer is here, and wait for the other ranks."""
        assert self.offer is not None
        return self.do_restore(deadline_s=deadline_s, staged=self.offer.decision_id)

    def _take_offer(self, offer: messages.Offer) -> dict[str, Any]:
        self.offer = offer
        return {
            "decision_id": offer.decision_id,
            "step": offer.step,
            "base_world_size": offer.base_world_size,
            "ranks": [manifest["rank"] for manifest in offer.manifests],
            "sizes": [manifest["size_bytes"] for manifest in offer.manifests],
            "kinds": list(offer.kinds),
            "details": list(offer.details),
        }

    def do_gate(self, entries: list[list[Any]], failure: str = "", deadline_s: float = 60.0) -> dict[str, Any]:
        """Say what was loaded, as (name, ranks, digest), and wait for the verdict."""
        message = messages.Gate(
            decision_id=self.decision_id,
            entries=tuple(messages.GateEntry(name=n, ranks=tuple(r), digest=d) for n, r, d in entries),
            failure=failure,
            deadline_s=deadline_s,
        )
        answer, _ = self._ask(message)
        return {"state": answer.state, "entries": list(answer.entries), "message": answer.message}

    def do_distrust(self, step: int, reason: str = "nan") -> dict[str, Any]:
        self._ask(messages.Distrust(step=step, reason=reason))
        return {}

    def do_reserve(self, step: int, wait_s: float = 20.0) -> dict[str, Any]:
        request = messages.Reserve(
            step=step, size_bytes=self.layout.size_bytes, wait_s=wait_s, known_slots=tuple(self.slots)
        )
        answer, fds = self._ask(request)
        if isinstance(answer, messages.Skipped):
            return {"skipped": answer.reason, "notice": answer.notice}
        for fd in fds:
            self.slots[answer.slot_id] = mmap.mmap(fd, self.layout.size_bytes)
            os.close(fd)
        self.reserved = answer
        return {"slot_id": answer.slot_id}

    def do_fill(self, step: int, seed: str = "") -> dict[str, Any]:
        """Write the step's bytes into the reserved slot and make its manifest."""
        assert self.reserved is not None
        content = memoryview(self.slots[self.reserved.slot_id])[: self.layout.size_bytes]
        write_content(content, self.layout, seed, step, self.rank)
        digester = Digester(self.layout)
        digester.update_span(content)
        chunk_crcs, tensor_crcs = digester.finish()
        manifest = build_manifest(
            self.layout,
            run=self.run,
            attempt=self.attempt,
            step=step,
            rank=self.rank,
            world_size=self.world_size,
            world_id=self.world_id,
            chunk_crcs=chunk_crcs,
            tensor_crcs=tensor_crcs,
        )
        self.manifest = json_records.to_json(replace(manifest, layout=self.boxes))
        return {"sha256": hashlib.sha256(content).hexdigest()}

    def do_slots(self) -> dict[str, Any]:
        return {"slot_ids": list(self.slots)}

    def do_scribble(self, slot_id: str = "", offset: int = -1) -> dict[str, Any]:
        """Flip a byte through the mapping that is still there: a late write."""
        slot = self.slots[slot_id or next(iter(self.slots))]
        at = offset if offset >= 0 else self.layout.header_bytes + CHUNK_BYTES // 2
        slot[at] ^= 0xFF
        return {"offset": at}

    def do_commit(
        self, step: int, snapshot_s: float = 0.0, fence_s: float = 0.0, waited_s: float = 0.0
    ) -> dict[str, Any]:
        assert self.reserved is not None
        cost = messages.TrainerCost(snapshot_s=snapshot_s, fence_s=fence_s, waited_s=waited_s)
        commit = messages.Commit(step=step, slot_id=self.reserved.slot_id, manifest=self.manifest, cost=cost)
        answer, _ = self._ask(commit)
        return {
            "digest": answer.digest,
            "interval_steps": answer.schedule.interval_steps,
            "notice": answer.notice,
        }

    def do_publish(self, step: int, seed: str = "", wait_s: float = 20.0) -> dict[str, Any]:
        """Reserve, fill and commit."""
        reserved = self.do_reserve(step, wait_s)
        if "skipped" in reserved:
            return reserved
        filled = self.do_fill(step, seed)
        return {**filled, **self.do_commit(step)}

    def do_finish(self) -> dict[str, Any]:
        self._ask(messages.Finish())
        return {}

    def do_fork(self) -> dict[str, Any]:
        """Leave a child behind that holds every descriptor, as a DataLoader worker does; it stays until it is killed."""
        pid = os.fork()
        if pid == 0:
            signal.pause()
            os._exit(0)
        return {"pid": pid}

    def _ask(self, message: Any) -> tuple[Any, list[int]]:
        assert self._socket is not None
        self._message_id += 1
        framing.send_frame(self._socket, message, message_id=self._message_id)
        while True:
            answer, message_id, fds = framing.receive_frame(self._socket)
            if message_id != self._message_id or isinstance(answer, messages.Progress):
                continue
            if isinstance(answer, messages.Error):
                raise RefusedError(answer)
            return answer, fds


def main(arguments: list[str]) -> int:
    path, run, rank, world_size, size_bytes = arguments
    if "LIGHT_RANK_UID" in os.environ:  # as another user from here on; what is imported was readable to the first
        os.setgroups([])
        os.setgid(int(os.environ["LIGHT_RANK_UID"]))
        os.setuid(int(os.environ["LIGHT_RANK_UID"]))
    serve_commands(LightRank(path, run, int(rank), int(world_size), int(size_bytes)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
