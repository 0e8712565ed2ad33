"""Coders that bring chunks for another layout: only those asked for, each verified and none twice, from the next source if
one fails."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstayd.coder.jobs import FetchChunks, FetchManifests, JobResult
from backstayd.store.paths import ShardRef
from backstayd.store.published import find_manifest
from backstayd.store.record_files import parse_manifest
from backstayd.store.staging import prepare_sparse, read_marks
from tests.component.coder_nodes import (
    KEY,
    RUN,
    CoderNode,
    encode_all,
    make_plan,
    publish_shard,
    random_volumes,
)
from tests.component.test_coder_group import assert_ok, flip, group_of, run

SIZE = 6 * CHUNK_BYTES + 11


def chunks_of(
    manifest: Manifest, *addresses: str, runs: tuple[tuple[int, int], ...] = ((0, 7),), **more: Any
) -> FetchChunks:
    return FetchChunks(
        shard=ShardRef.of(RUN, manifest),
        firsts=tuple(first for first, _ in runs),
        counts=tuple(count for _, count in runs),
        addresses=addresses,
        deadline_s=30.0,
        **more,
    )


def prepare(node: CoderNode, manifest: Manifest) -> None:
    prepare_sparse(node.paths, json_records.dumps(manifest), digest=manifest.digest, incarnation=node.incarnation)


def marks(node: CoderNode, manifest: Manifest) -> bytes:
    return read_marks(node.paths, parse_manifest(json_records.dumps(manifest), digest=manifest.digest))


def content(node: CoderNode, manifest: Manifest) -> bytes:
    return node.paths.sparse(manifest.rank, manifest.world_size, manifest.digest).read_bytes()


async def fetch(node: CoderNode, job: FetchChunks) -> JobResult:
    return await node.coders.run(job)


def test_only_the_chunks_asked_for_come_and_none_twice(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 2) as nodes:
            (manifest,), _ = random_volumes(nodes, [[SIZE], []], seed=1)
            original = nodes[0].paths.shard(KEY, 0, 1).read_bytes()
            prepare(nodes[1], manifest)
            first = await fetch(nodes[1], chunks_of(manifest, nodes[0].address, runs=((1, 2), (6, 1))))
            assert_ok([first])
            assert first.done_bytes == 2 * CHUNK_BYTES + 11
            assert marks(nodes[1], manifest) == b"\x00\x01\x01\x00\x00\x00\x01"
            second = await fetch(nodes[1], chunks_of(manifest, nodes[0].address))
            assert_ok([second])
            assert first.done_bytes + second.done_bytes == SIZE
            assert content(nodes[1], manifest) == original

    run(scenario)


def test_a_corrupt_source_is_named_and_the_next_one_brings_the_rest(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 3) as nodes:
            (manifest,), _, _ = random_volumes(nodes, [[SIZE], [], []], seed=2)
            original = nodes[0].paths.shard(KEY, 0, 1).read_bytes()
            publish_shard(nodes[1].paths, 0, original, world_size=1)
            flip(nodes[0].paths.shard(KEY, 0, 1), 4 * CHUNK_BYTES + 9)
            prepare(nodes[2], manifest)
            result = await fetch(nodes[2], chunks_of(manifest, nodes[0].address, nodes[1].address))
            assert_ok([result])
            assert [corrupt.node for corrupt in result.corrupt] == [nodes[0].address]
            assert content(nodes[2], manifest) == original
            assert result.done_bytes == SIZE, "what the first source had right was not fetched again"
            alone = await fetch(nodes[1], chunks_of(manifest, nodes[0].address))
            assert alone.error_class != "", "nothing was prepared"
            prepare(nodes[1], manifest)
            alone = await fetch(nodes[1], chunks_of(manifest, nodes[0].address))
            assert (alone.error_class, alone.reason) == ("IntegrityError", "corrupt")
            assert marks(nodes[1], manifest)[4] == 0

    run(scenario)


def test_a_coder_killed_in_the_middle_leaves_chunks_that_are_not_fetched_again(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        once = tmpfs_dir / "once"
        environment = {"BACKSTAY_FAULTS": f"mid_fetch,rank=0,once={once}:kill"}
        async with group_of(tmpfs_dir, 2, {1: environment}) as nodes:
            (manifest,), _ = random_volumes(nodes, [[SIZE], []], seed=3)
            prepare(nodes[1], manifest)
            job = chunks_of(manifest, nodes[0].address)
            assert (await fetch(nodes[1], job)).reason == "coder_died"
            here = marks(nodes[1], manifest).count(b"\x01")
            assert 0 < here < 7
            again = await fetch(nodes[1], job)
            assert_ok([again])
            assert again.done_bytes == SIZE - here * CHUNK_BYTES
            assert content(nodes[1], manifest) == nodes[0].paths.shard(KEY, 0, 1).read_bytes()

    run(scenario)


def test_chunks_of_a_shard_that_lies_here_are_verified_where_they_are(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 1) as nodes:
            ((manifest,),) = random_volumes(nodes, [[SIZE]], seed=4)
            flip(nodes[0].paths.shard(KEY, 0, 1), 5 * CHUNK_BYTES)
            assert_ok([await fetch(nodes[0], chunks_of(manifest, runs=((0, 5),), is_here=True))])
            bad = await fetch(nodes[0], chunks_of(manifest, runs=((4, 3),), is_here=True))
            assert (bad.error_class, bad.reason) == ("IntegrityError", "corrupt")
            assert [(corrupt.node, corrupt.shard.rank) for corrupt in bad.corrupt] == [("", 0)]

    run(scenario)


def test_manifests_of_lost_shards_come_from_the_plans_of_their_group(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 4) as nodes:
            volumes = random_volumes(nodes, [[CHUNK_BYTES], [SIZE], [CHUNK_BYTES], []], seed=5)
            plan = make_plan(nodes[:3], volumes[:3], m=1)
            assert_ok(await encode_all(nodes[:3], plan))
            gone = nodes[1].address
            await nodes[1].destroy()
            manifests = [manifest for volume in volumes for manifest in volume]
            job = FetchManifests(
                shards=tuple(ShardRef.of(RUN, manifest) for manifest in manifests),
                addresses=(gone, nodes[0].address, nodes[2].address),
                deadline_s=30.0,
            )
            assert_ok([await nodes[3].coders.run(job)])
            for manifest in manifests:
                assert find_manifest(nodes[3].paths, ShardRef.of(RUN, manifest)) == json_records.dumps(manifest)
            unknown = dataclasses.replace(job, shards=(dataclasses.replace(job.shards[1], digest="0" * 64),))
            result = await nodes[3].coders.run(unknown)
            assert (result.error_class, result.reason) == ("UnavailableError", "no_manifest")

    run(scenario)
