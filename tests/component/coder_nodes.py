"""Nodes of a group made of directories and real coder pools, for the tests of coders and bulk transport."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

from crc32c import crc32c

from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest, UnchangedRange
from backstay.ids import SnapshotKey, snapshot_id
from backstayd.coder.jobs import CoderEvent, EncodeStripe, JobResult
from backstayd.coder.pool import CoderPool
from backstayd.core.messages.plans import Member, Plan, VolumeShard
from backstayd.store.paths import RunPaths
from backstayd.store.record_files import StoredFragment

RUN = "job/run"
KEY = SnapshotKey(1, 12)


def listening_socket() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(128)
    return sock


@dataclass(slots=True)
class CoderNode:
    """One directory, one pool."""

    name: str
    directory: Path
    incarnation: str = "00000000000000aa"
    socket: socket.socket = field(default_factory=listening_socket)
    events: list[CoderEvent] = field(default_factory=list)
    pool: CoderPool | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.socket.getsockname()[1]}"

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.directory, RUN)

    @property
    def coders(self) -> CoderPool:
        assert self.pool is not None
        return self.pool

    async def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.pool = CoderPool(
            count=1,
            memory_dir=self.directory,
            incarnation=self.incarnation,
            listen_socket=self.socket,
            on_event=self.events.append,
            niceness=0,
            extra_environment=self.environment,
        )
        await self.pool.start()

    async def close(self) -> None:
        if self.pool is not None:
            await self.pool.close()
        self.socket.close()

    async def destroy(self) -> None:
        """The node and its memory are gone."""
        await self.close()
        shutil.rmtree(self.directory)


def publish_shard(
    paths: RunPaths,
    rank: int,
    data: bytes,
    *,
    world_size: int,
    key: SnapshotKey = KEY,
    unchanged: tuple[UnchangedRange, ...] = (),
) -> Manifest:
    """Put a committed shard of arbitrary bytes where a supervisor would."""
    crcs = "".join(f"{crc32c(data[i : i + CHUNK_BYTES]):08x}" for i in range(0, len(data), CHUNK_BYTES))
    manifest = Manifest(
        run=RUN,
        attempt=key.attempt,
        step=key.step,
        rank=rank,
        world_size=world_size,
        world_id="world",
        size_bytes=len(data),
        header_bytes=0,
        chunk_crcs=crcs,
        tensors=(),
        unchanged=unchanged,
    )
    paths.snapshot(key).mkdir(parents=True, exist_ok=True)
    paths.shard(key, rank, world_size).write_bytes(data)
    paths.manifest(key, rank, world_size).write_bytes(json_records.dumps(manifest))
    return manifest


def make_plan(nodes: list[CoderNode], volumes: list[list[Manifest]], *, m: int, key: SnapshotKey = KEY) -> Plan:
    """A sealed plan over ``nodes`` in order."""
    manifests = sorted((mf for volume in volumes for mf in volume), key=lambda mf: mf.rank)
    world = len(manifests)
    return Plan(
        run=RUN,
        snapshot_id=snapshot_id(key=key, world_size=world, shard_digests=[mf.digest for mf in manifests]),
        attempt=key.attempt,
        step=key.step,
        world_size=world,
        m=m,
        chunk_bytes=CHUNK_BYTES,
        members=tuple(
            Member(
                node=node.name,
                incarnation=node.incarnation,
                bulk_address=node.address,
                shards=tuple(VolumeShard(rank=mf.rank, size_bytes=mf.size_bytes, digest=mf.digest) for mf in volume),
            )
            for node, volume in zip(nodes, volumes, strict=True)
        ),
    ).sealed()


def random_volumes(nodes: list[CoderNode], sizes: list[list[int]], *, seed: int) -> list[list[Manifest]]:
    """Publish shards of the given sizes, ranks in node order; returns the manifests per node."""
    generator = random.Random(seed)
    world = sum(len(volume) for volume in sizes)
    rank = 0
    volumes: list[list[Manifest]] = []
    for node, volume in zip(nodes, sizes, strict=True):
        manifests = []
        for size in volume:
            manifests.append(publish_shard(node.paths, rank, generator.randbytes(size), world_size=world))
            rank += 1
        volumes.append(manifests)
    return volumes


async def encode_all(nodes: list[CoderNode], plan: Plan, *, deadline_s: float = 60.0) -> list[JobResult]:
    """Every member encodes its stripe at once."""
    jobs = (
        node.coders.run(EncodeStripe(plan=plan, stripe=stripe, deadline_s=deadline_s))
        for stripe, node in enumerate(nodes)
    )
    return list(await asyncio.gather(*jobs))


def leftover_temporaries(nodes: list[CoderNode]) -> list[Path]:
    return [path for node in nodes for path in node.directory.rglob("*.tmp")]


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def spoil_parity(paths: RunPaths, plan: Plan, *, stripe: int, index: int, at: int) -> None:
    """Change a byte and have the record agree, as an encoder would whose bit flipped."""
    path = paths.fragment(plan.key, plan.plan_id, stripe=stripe, index=index)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    record_path = paths.fragment_record(plan.key, plan.plan_id, stripe=stripe, index=index)
    stored = json_records.loads(StoredFragment, record_path.read_bytes())
    crcs = "".join(f"{crc32c(data[i : i + CHUNK_BYTES]):08x}" for i in range(0, len(data), CHUNK_BYTES))
    record_path.write_bytes(json_records.dumps(dataclasses.replace(stored, chunk_crcs=crcs)))
