"""Parity of what did not change is taken from an older plan, is what a full encoding gives, and is caught where it is wrong."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
from crc32c import crc32c

from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest, UnchangedRange
from backstay.ids import SnapshotKey
from backstayd.coder.jobs import JobResult
from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import Plan, seal_rebuild
from backstayd.store.record_files import StoredFragment
from tests.component.coder_nodes import CoderNode, encode_all, leftover_temporaries, make_plan, publish_shard
from tests.component.test_coder_group import assert_ok, decode_all, group_of, prepare, rebuild_of, run

SIZES = [[40 * CHUNK_BYTES + 5], [30 * CHUNK_BYTES], [9 * CHUNK_BYTES, 12 * CHUNK_BYTES + 700], [], [33 * CHUNK_BYTES]]
M = 2
KEYS = [SnapshotKey(1, step) for step in (10, 11, 12)]


class History:
    """Snapshots of a group whose shards keep all but their last chunks."""

    def __init__(self, nodes: list[CoderNode], *, seed: int = 0) -> None:
        self.nodes = nodes
        self.chance = random.Random(seed)
        self.world = sum(len(volume) for volume in SIZES)
        self.data: dict[int, bytearray] = {}
        self.volumes: dict[SnapshotKey, list[list[Manifest]]] = {}

    def publish(self, key: SnapshotKey, *, since: int | None, changed: int = 3) -> Plan:
        """Change the last chunks of every shard, say that the others are as they were ``since``, commit."""
        volumes, rank = [], 0
        for node, sizes in zip(self.nodes, SIZES, strict=True):
            volume = []
            for size in sizes:
                data = self.data.setdefault(rank, bytearray(self.chance.randbytes(size)))
                kept = -(-len(data) // CHUNK_BYTES) - changed
                data[kept * CHUNK_BYTES :] = self.chance.randbytes(len(data) - kept * CHUNK_BYTES)
                said = UnchangedRange(first_chunk=0, chunk_count=kept, since_step=since or 0)
                unchanged = () if since is None else (said,)
                published = publish_shard(
                    node.paths, rank, bytes(data), world_size=self.world, key=key, unchanged=unchanged
                )
                volume.append(published)
                rank += 1
            volumes.append(volume)
        self.volumes[key] = volumes
        return make_plan(self.nodes, volumes, m=M, key=key)

    def shards(self, key: SnapshotKey, member: int) -> dict[int, bytes]:
        node = self.nodes[member]
        return {mf.rank: node.paths.shard(key, mf.rank, self.world).read_bytes() for mf in self.volumes[key][member]}


def moved(results: list[JobResult], what: str) -> int:
    return sum(result.moved.get(what, 0) for result in results)


def parity(nodes: list[CoderNode], plan: Plan) -> dict[tuple[int, int], bytes]:
    n = len(nodes)
    return {
        (stripe, index): nodes[member].paths.fragment(plan.key, plan.plan_id, stripe=stripe, index=index).read_bytes()
        for stripe in range(n)
        for index, member in enumerate(geometry.parity_members(stripe, n=n, m=M))
    }


def forget_parity(nodes: list[CoderNode], plan: Plan) -> None:
    for node in nodes:
        for path in node.paths.parity(plan.key).glob(f"plan-{plan.plan_id}*"):
            path.unlink()


def flip_parity(node: CoderNode, plan: Plan, stripe: int, index: int, *, with_record: bool) -> None:
    """Damage chunk 0 of a fragment; ``with_record``: and make its record agree, as a wrong encoding would."""
    path = node.paths.fragment(plan.key, plan.plan_id, stripe=stripe, index=index)
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    if with_record:
        record_path = node.paths.fragment_record(plan.key, plan.plan_id, stripe=stripe, index=index)
        stored = json_records.loads(StoredFragment, record_path.read_bytes())
        crcs = f"{crc32c(data[:CHUNK_BYTES]):08x}" + stored.chunk_crcs[8:]
        record_path.write_bytes(json_records.dumps(dataclasses.replace(stored, chunk_crcs=crcs)))


def test_parity_of_unchanged_chunks_is_kept_and_equals_a_full_encoding(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, len(SIZES)) as nodes:
            history = History(nodes)
            first = history.publish(KEYS[0], since=None)
            full = await encode_all(nodes, first)
            assert_ok(full)
            assert moved(full, "kept") == 0
            plans = [first]
            for key in KEYS[1:]:
                plan = history.publish(key, since=10)
                results = await encode_all(nodes, plan)
                assert_ok(results)
                assert moved(results, "kept") > moved(results, "encoded")
                assert moved(results, "read") < 0.7 * moved(full, "read")
                found = parity(nodes, plan)
                for one in (*plans, plan):
                    forget_parity(nodes, one)
                assert_ok(again := await encode_all(nodes, plan))
                assert moved(again, "kept") == 0
                assert parity(nodes, plan) == found
                plans.append(plan)
            assert leftover_temporaries(nodes) == []

    run(scenario)


def test_a_node_lost_after_many_kept_snapshots_is_rebuilt_byte_for_byte(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, len(SIZES)) as nodes:
            history = History(nodes)
            keys = [SnapshotKey(1, step) for step in range(10, 18)]
            plans = [history.publish(key, since=None if key.step == 10 else 10) for key in keys[:1]]
            assert_ok(await encode_all(nodes, plans[0]))
            for key in keys[1:]:
                plans.append(history.publish(key, since=10))
                results = await encode_all(nodes, plans[-1])
                assert_ok(results)
                assert moved(results, "kept") > 0
                forget_parity(nodes, plans[-2])
            expected = history.shards(keys[-1], 0)
            await nodes[1].destroy()
            await nodes[0].close()
            for rank in expected:
                nodes[0].paths.shard(keys[-1], rank, history.world).unlink()
                nodes[0].paths.manifest(keys[-1], rank, history.world).unlink()
            prepare(nodes[2], history.volumes[keys[-1]][0])
            rebuild = rebuild_of(plans[-1], nodes, {0: nodes[2], 1: nodes[3]})
            rebuild_only = dataclasses.replace(
                rebuild, targets=tuple(t for t in rebuild.targets if t.member_index == 0)
            )
            assert_ok(await decode_all(nodes, seal_rebuild(rebuild_only)))
            for manifest in history.volumes[keys[-1]][0]:
                staged = nodes[2].paths.staged(manifest.rank, history.world, manifest.digest).read_bytes()
                assert staged == expected[manifest.rank]

    run(scenario)


@pytest.mark.parametrize("reason", ["since", "world", "attempt", "crc", "size"])
def test_what_is_not_certainly_the_same_is_encoded(tmpfs_dir: Path, reason: str) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, len(SIZES)) as nodes:
            history = History(nodes)
            assert_ok(await encode_all(nodes, history.publish(KEYS[0], since=None)))
            if reason == "crc":
                for data in history.data.values():
                    for chunk in range(0, len(data), CHUNK_BYTES):
                        data[chunk] ^= 1  # said to be the same, and is not
            key = SnapshotKey(2, 12) if reason == "attempt" else KEYS[2]
            if reason == "size":
                history.data = {rank: data + b"more" for rank, data in history.data.items()}
            plan = history.publish(key, since={"since": 11}.get(reason, 10))
            if reason == "world":
                volumes = [
                    [dataclasses.replace(mf, world_id="another") for mf in volume] for volume in history.volumes[key]
                ]
                for node, volume in zip(nodes, volumes, strict=True):
                    for mf in volume:
                        node.paths.manifest(key, mf.rank, history.world).write_bytes(json_records.dumps(mf))
                plan = make_plan(nodes, volumes, m=M, key=key)
            results = await encode_all(nodes, plan)
            assert_ok(results)
            assert moved(results, "kept") == 0

    run(scenario)


@pytest.mark.parametrize("damage", ["own", "peer", "gone"])
def test_damaged_or_missing_older_parity_is_encoded_anew(tmpfs_dir: Path, damage: str) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, len(SIZES)) as nodes:
            history = History(nodes)
            first = history.publish(KEYS[0], since=None)
            assert_ok(await encode_all(nodes, first))
            if damage == "own":
                flip_parity(nodes[0], first, 0, 0, with_record=False)
            elif damage == "peer":
                flip_parity(nodes[1], first, 0, 1, with_record=False)
            else:
                nodes[1].paths.fragment_record(first.key, first.plan_id, stripe=0, index=1).unlink()
            plan = history.publish(KEYS[1], since=10)
            results = await encode_all(nodes, plan)
            assert_ok(results)
            assert moved(results[1:], "kept") > 0
            found = parity(nodes, plan)
            forget_parity(nodes, first)
            forget_parity(nodes, plan)
            assert_ok(await encode_all(nodes, plan))
            assert parity(nodes, plan) == found

    run(scenario)


def test_wrong_parity_that_was_kept_is_caught_when_it_is_decoded(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, len(SIZES)) as nodes:
            history = History(nodes)
            first = history.publish(KEYS[0], since=None)
            assert_ok(await encode_all(nodes, first))
            flip_parity(nodes[1], first, 1, 0, with_record=True)
            plan = history.publish(KEYS[1], since=10)
            assert_ok(await encode_all(nodes, plan))
            forget_parity(nodes, first)
            lost = 4  # data member of stripe 1: decoded with that parity
            prepare(nodes[2], history.volumes[KEYS[1]][lost])
            rebuild = rebuild_of(plan, nodes, {lost: nodes[2]})
            results = await decode_all(nodes, rebuild)
            assert any(result.error_class == "IntegrityError" for result in results), results

    run(scenario)
