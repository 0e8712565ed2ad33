"""A group of real coder processes: encode, lose nodes, rebuild, compare; damage at rest and in flight; death in mid-job."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstayd.coder.jobs import (
    DecodeStripe,
    EncodeStripe,
    FetchPlan,
    FetchShard,
    JobResult,
    VerifyFragment,
    VerifyShard,
)
from backstayd.core.inventory import geometry
from backstayd.core.messages.plans import FragmentSource, Plan, Rebuild, RebuildTarget, RebuildTask, seal_rebuild
from backstayd.store.paths import FragmentRef, ShardRef
from backstayd.store.published import read_plan
from backstayd.store.staging import missing_stripes, prepare_staging
from tests.component.coder_nodes import (
    KEY,
    RUN,
    CoderNode,
    encode_all,
    leftover_temporaries,
    make_plan,
    random_volumes,
    spoil_parity,
)
from tests.component.flipping_proxy import FlippingProxy

MIB = 1 << 20
SIZES = [[2 * MIB + 5], [3 * MIB], [MIB, 700_001], [], [5], [4 * MIB - 1]]  # unequal, empty, several ranks per node


@asynccontextmanager
async def group_of(
    directory: Path, count: int, environments: dict[int, dict[str, str]] | None = None
) -> AsyncIterator[list[CoderNode]]:
    nodes = [
        CoderNode(name=f"node-{i}", directory=directory / f"node-{i}", environment=(environments or {}).get(i, {}))
        for i in range(count)
    ]
    try:
        for node in nodes:
            await node.start()
        yield nodes
    finally:
        for node in nodes:
            await node.close()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    """Run a scenario; it ends within two minutes or fails."""

    async def bounded() -> None:
        async with asyncio.timeout(120):
            await scenario()

    asyncio.run(bounded())


def assert_ok(results: Iterable[JobResult]) -> None:
    for result in results:
        assert result.error_class == "", result


async def eventually(condition: Callable[[], bool], why: str) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"not within 10 s: {why}")


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


def rebuild_of(plan: Plan, nodes: list[CoderNode], owners: dict[int, CoderNode], *, spare: bool = False) -> Rebuild:
    """Rebuild the members in ``owners`` there; stripe after stripe decoded by the survivors in turn."""
    n, m = len(plan.members), plan.m
    survivors = [index for index in range(n) if index not in owners]
    targets = tuple(
        RebuildTarget(
            member_index=member, rank=shard.rank, digest=shard.digest, node=owner.name, bulk_address=owner.address
        )
        for member, owner in owners.items()
        for shard in plan.members[member].shards
    )
    tasks = []
    for stripe in range(n):
        members = [*geometry.data_members(stripe, n=n, m=m), *geometry.parity_members(stripe, n=n, m=m)]
        sources = tuple(
            FragmentSource(
                stripe=stripe, index=index, node=nodes[member].name, bulk_address=plan.members[member].bulk_address
            )
            for index, member in enumerate(members)
            if member not in owners
        )
        decoder = nodes[survivors[stripe % len(survivors)]].name
        tasks.append(RebuildTask(stripe=stripe, decoder=decoder, sources=sources if spare else sources[: plan.k]))
    return seal_rebuild(Rebuild(rebuild_id="", plan=plan, targets=targets, tasks=tuple(tasks)))


async def decode_all(nodes: list[CoderNode], rebuild: Rebuild) -> list[JobResult]:
    by_name = {node.name: node for node in nodes}
    return list(
        await asyncio.gather(
            *(
                by_name[task.decoder].coders.run(DecodeStripe(rebuild=rebuild, stripe=task.stripe, deadline_s=60))
                for task in rebuild.tasks
            )
        )
    )


def prepare(node: CoderNode, manifests: Iterable[Manifest]) -> None:
    for manifest in manifests:
        prepare_staging(node.paths, json_records.dumps(manifest), digest=manifest.digest, incarnation=node.incarnation)


def test_two_destroyed_nodes_are_rebuilt_byte_for_byte_on_a_replacement_and_a_survivor(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 7) as nodes:
            *members, replacement = nodes
            volumes = random_volumes(members, SIZES, seed=1)
            plan = make_plan(members, volumes, m=2)
            world = plan.world_size
            originals = {
                manifest.rank: node.paths.shard(KEY, manifest.rank, world).read_bytes()
                for node, volume in zip(members, volumes, strict=True)
                for manifest in volume
            }
            assert_ok(await encode_all(members, plan))
            assert leftover_temporaries(members) == []
            for stripe in range(6):
                for index, member in enumerate(geometry.parity_members(stripe, n=6, m=2)):
                    path = members[member].paths.fragment(KEY, plan.plan_id, stripe=stripe, index=index)
                    assert path.stat().st_size == geometry.fragment_bytes(plan, stripe)
            assert all(read_plan(node.paths, plan)[0].plan == plan for node in members)

            owners = {2: replacement, 5: members[0]}
            for member in owners:
                await members[member].destroy()
                assert not members[member].directory.exists()
            survivors = [nodes[i] for i in (0, 1, 3, 4, 6)]
            waiting = asyncio.create_task(decode_all(survivors, rebuild_of(plan, members, owners)))
            for member, owner in owners.items():
                assert not waiting.done(), "owners are not ready yet, so nothing can be complete"
                prepare(owner, volumes[member])
            assert_ok(await waiting)
            for member, owner in owners.items():
                for shard in plan.members[member].shards:
                    staged = owner.paths.staged(shard.rank, world, shard.digest)
                    assert staged.read_bytes() == originals[shard.rank]
                    assert not missing_stripes(owner.paths, plan, member=member, rank=shard.rank)
            assert leftover_temporaries(survivors) == []
            kinds = {event.kind for event in replacement.events}
            assert "stripe_staged" in kinds

    run(scenario)


def test_encoding_twice_changes_nothing_and_a_fragment_is_announced_where_it_lies(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 3) as nodes:
            plan = make_plan(nodes, random_volumes(nodes, [[MIB], [MIB + 1], [9]], seed=2), m=2)
            assert_ok(await encode_all(nodes, plan))
            before = {path: path.read_bytes() for node in nodes for path in node.paths.parity(KEY).iterdir()}
            assert_ok(await encode_all(nodes, plan))
            assert before == {path: path.read_bytes() for node in nodes for path in node.paths.parity(KEY).iterdir()}
            for stripe in range(3):
                for index, member in enumerate(geometry.parity_members(stripe, n=3, m=2)):
                    announced = {
                        (event.fragment.stripe, event.fragment.index)
                        for event in nodes[member].events
                        if event.fragment and event.kind == "fragment_stored" and event.fragment.plan_id == plan.plan_id
                    }
                    assert (stripe, index) in announced

    run(scenario)


def test_without_parity_only_the_plan_is_stored(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 2) as nodes:
            plan = make_plan(nodes, random_volumes(nodes, [[MIB], [MIB]], seed=3), m=0)
            assert_ok(await encode_all(nodes, plan))
            for node in nodes:
                assert [path.name for path in node.paths.parity(KEY).iterdir()] == [f"plan-{plan.plan_id}.json"]

    run(scenario)


def test_a_flipped_byte_at_rest_in_shard_parity_and_manifest_is_found_where_it_lies(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 3) as nodes:
            volumes = random_volumes(nodes, [[MIB], [MIB], [MIB]], seed=4)
            plan = make_plan(nodes, volumes, m=1)
            assert_ok(await encode_all(nodes, plan))
            shards = [verify_of(manifest) for volume in volumes for manifest in volume]
            assert_ok([await node.coders.run(job) for node, job in zip(nodes, shards, strict=True)])
            fragment = VerifyFragment(plan=plan, stripe=1, index=0)
            assert_ok([await nodes[1].coders.run(fragment)])

            flip(nodes[0].paths.shard(KEY, 0, 3), 300_000)
            (corrupt,) = (await nodes[0].coders.run(shards[0])).corrupt
            assert (corrupt.node, corrupt.shard) == ("", ShardRef.of(RUN, volumes[0][0]))
            assert "chunk 1" in corrupt.detail

            flip(nodes[1].paths.fragment(KEY, plan.plan_id, stripe=1, index=0), 5)
            (corrupt,) = (await nodes[1].coders.run(fragment)).corrupt
            assert corrupt.fragment == FragmentRef.of(plan, 1, 0)

            flip(nodes[2].paths.manifest(KEY, 2, 3), 40)
            result = await nodes[2].coders.run(shards[2])
            assert result.error_class == "IntegrityError"
            assert [c.shard.rank for c in result.corrupt] == [2]

    run(scenario)


def verify_of(manifest: Manifest, *, is_staged: bool = False) -> VerifyShard:
    return VerifyShard(shard=ShardRef.of(RUN, manifest), is_staged=is_staged, deadline_s=20)


def fetch_of(manifest: Manifest, *addresses: str) -> FetchShard:
    ref = ShardRef.of(RUN, manifest)
    return FetchShard(shard=ref, size_bytes=manifest.size_bytes, addresses=addresses, deadline_s=20)


def test_a_corrupt_shard_never_enters_parity_and_its_holder_is_told(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 3) as nodes:
            plan = make_plan(nodes, random_volumes(nodes, [[MIB], [MIB], [MIB]], seed=5), m=1)
            flip(nodes[0].paths.shard(KEY, 0, 3), 10)  # of block 0, in the first stripe that node 0 gives data to
            results = await encode_all(nodes, plan, deadline_s=20)
            failed = [result for result in results if result.error_class]
            assert [result.error_class for result in failed] == ["IntegrityError"]
            assert [(c.node, c.shard.rank) for c in failed[0].corrupt] == [(nodes[0].address, 0)]
            stripe = results.index(failed[0])
            assert not nodes[stripe].paths.fragment_record(KEY, plan.plan_id, stripe=stripe, index=0).exists()

    run(scenario)


def test_a_rebuild_goes_on_with_a_spare_source_when_one_is_corrupt(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 5) as nodes:
            volumes = random_volumes(nodes, [[3 * MIB] for _ in nodes], seed=6)
            plan = make_plan(nodes, volumes, m=2)
            assert_ok(await encode_all(nodes, plan))
            original = nodes[4].paths.shard(KEY, 4, 5).read_bytes()
            flip(nodes[1].paths.shard(KEY, 1, 5), 7)  # of its block in stripe 2, which node 2 decodes
            prepare(nodes[0], volumes[4])
            await nodes[4].destroy()
            results = await decode_all(nodes[:4], rebuild_of(plan, nodes, {4: nodes[0]}, spare=True))
            assert_ok(results)
            blamed = {(c.shard.rank, c.node) for result in results for c in result.corrupt}
            assert blamed == {(1, nodes[1].address)}
            manifest = volumes[4][0]
            assert nodes[0].paths.staged(4, 5, manifest.digest).read_bytes() == original
            assert_ok([await nodes[0].coders.run(verify_of(manifest, is_staged=True))])

    run(scenario)


def test_parity_that_is_wrong_with_right_digests_is_named_and_its_shard_rebuilt_without_it(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 6) as nodes:
            volumes = random_volumes(nodes, [[3 * MIB + 70] for _ in nodes], seed=21)
            plan = make_plan(nodes, volumes, m=3)
            assert_ok(await encode_all(nodes, plan))
            original = nodes[5].paths.shard(KEY, 5, 6).read_bytes()
            spoil_parity(nodes[1].paths, plan, stripe=1, index=0, at=2 * CHUNK_BYTES + 5)  # where stripe 1 is decoded
            spoil_parity(nodes[2].paths, plan, stripe=1, index=1, at=2 * CHUNK_BYTES + 9)  # at a peer
            assert_ok([await nodes[1].coders.run(VerifyFragment(plan=plan, stripe=1, index=0, deadline_s=20))])
            prepare(nodes[0], volumes[5])
            await nodes[5].destroy()
            results = await decode_all(nodes[:5], rebuild_of(plan, nodes, {5: nodes[0]}, spare=True))
            assert_ok(results)
            named = {(c.node, c.fragment, c.is_misfit) for result in results for c in result.corrupt}
            assert named == {
                ("", FragmentRef.of(plan, 1, 0), True),
                (nodes[2].address, FragmentRef.of(plan, 1, 1), True),
            }
            manifest = volumes[5][0]
            assert nodes[0].paths.staged(5, 6, manifest.digest).read_bytes() == original
            assert_ok([await nodes[0].coders.run(verify_of(manifest, is_staged=True))])

    run(scenario)


def test_wrong_parity_without_another_is_named_until_its_holder_has_looked_and_nothing_is_rebuilt_of_it(
    tmpfs_dir: Path,
) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 4) as nodes:
            volumes = random_volumes(nodes, [[MIB] for _ in nodes], seed=22)
            plan = make_plan(nodes, volumes, m=1)
            assert_ok(await encode_all(nodes, plan))
            spoil_parity(nodes[1].paths, plan, stripe=1, index=0, at=5)
            prepare(nodes[0], volumes[3])
            await nodes[3].destroy()
            results = await decode_all(nodes[:3], rebuild_of(plan, nodes, {3: nodes[0]}, spare=True))
            (failed,) = [result for result in results if result.error_class]
            assert (failed.error_class, failed.reason) == ("IntegrityError", "bad_rebuild")
            assert [(c.fragment, c.is_misfit) for c in failed.corrupt] == [(FragmentRef.of(plan, 1, 0), False)]
            assert missing_stripes(nodes[0].paths, plan, member=3, rank=3) == (1,)

    run(scenario)


def test_a_byte_flipped_once_in_flight_is_counted_and_survived(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 3) as nodes:
            with FlippingProxy(nodes[0].address, at=100_000, times=1) as proxy:
                volumes = random_volumes(nodes, [[3 * MIB] for _ in nodes], seed=7)
                plan = make_plan(nodes, volumes, m=1)
                members = (dataclasses.replace(plan.members[0], bulk_address=proxy.address), *plan.members[1:])
                plan = dataclasses.replace(plan, members=members).sealed()
                results = await encode_all(nodes, plan)
                assert_ok(results)
                assert proxy.flipped_count == 1
                assert sum(result.flipped_in_flight for result in results) == 1
                assert not any(result.corrupt for result in results)

    run(scenario)


def test_a_byte_flipped_always_in_flight_is_never_used_and_the_source_is_named(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 2) as nodes:
            (manifest,), _ = random_volumes(nodes, [[MIB], []], seed=8)
            with FlippingProxy(nodes[0].address, at=100_000, times=-1) as proxy:
                result = await nodes[1].coders.run(fetch_of(manifest, proxy.address))
                assert result.error_class == "IntegrityError"
                assert [c.node for c in result.corrupt] == [proxy.address]
                assert proxy.flipped_count >= 2
                result = await nodes[1].coders.run(fetch_of(manifest, proxy.address, nodes[0].address))
                assert_ok([result])
            staged = nodes[1].paths.staged(0, 1, manifest.digest)
            assert staged.read_bytes() == nodes[0].paths.shard(KEY, 0, 1).read_bytes()

    run(scenario)


def test_parity_flipped_on_its_way_to_its_member_is_refused_and_encoded_again(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 3) as nodes:
            with FlippingProxy(nodes[1].address, at=50_000, times=1, is_from_server=False) as proxy:
                volumes = random_volumes(nodes, [[MIB], [MIB], [MIB]], seed=9)
                plan = make_plan(nodes, volumes, m=2)
                members = tuple(
                    dataclasses.replace(member, bulk_address=proxy.address) if index == 1 else member
                    for index, member in enumerate(plan.members)
                )
                plan = dataclasses.replace(plan, members=members).sealed()
                results = await encode_all(nodes, plan)
                assert [(r.error_class, r.reason) for r in results if r.error_class] == [
                    ("UnavailableError", "flipped_in_flight")
                ]
                assert not nodes[1].paths.fragment(KEY, plan.plan_id, stripe=0, index=1).exists()
                assert_ok(await encode_all(nodes, plan))
                assert_ok([await nodes[1].coders.run(VerifyFragment(plan=plan, stripe=0, index=1, deadline_s=20))])
            assert leftover_temporaries(nodes) == []

    run(scenario)


def test_a_withdrawn_source_is_gone_and_not_called_corrupt(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 2) as nodes:
            (manifest,), _ = random_volumes(nodes, [[MIB], []], seed=10)
            nodes[0].paths.manifest(KEY, 0, 1).unlink()
            flip(nodes[0].paths.shard(KEY, 0, 1), 77)
            result = await nodes[1].coders.run(fetch_of(manifest, nodes[0].address))
            assert (result.error_class, result.reason) == ("SnapshotNotFoundError", "gone")
            assert result.corrupt == ()

    run(scenario)


def test_a_cut_shard_is_corrupt(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 2) as nodes:
            (manifest,), _ = random_volumes(nodes, [[MIB], []], seed=11)
            os.truncate(nodes[0].paths.shard(KEY, 0, 1), MIB - 1)
            result = await nodes[1].coders.run(fetch_of(manifest, nodes[0].address))
            assert result.error_class == "IntegrityError"
            assert [c.shard.rank for c in result.corrupt] == [0]

    run(scenario)


def test_a_plan_is_fetched_from_whichever_member_has_it(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 3) as nodes:
            plan = make_plan(nodes[:2], random_volumes(nodes[:2], [[9], [8]], seed=12), m=1)
            job = FetchPlan(plan=plan, addresses=(nodes[0].address, nodes[1].address), deadline_s=10)
            assert (await nodes[2].coders.run(job)).reason == "no_plan"
            assert_ok(await encode_all(nodes[:2], plan))
            nodes[0].paths.plan(KEY, plan.plan_id).unlink()
            assert_ok([await nodes[2].coders.run(job)])
            assert read_plan(nodes[2].paths, plan)[0].plan == plan

    run(scenario)


@pytest.mark.parametrize("point", ["mid_encode", "mid_forward"])
def test_a_coder_killed_in_mid_job_is_restarted_leaves_nothing_and_the_job_succeeds_again(
    tmpfs_dir: Path, point: str
) -> None:
    async def scenario() -> None:
        once = tmpfs_dir / "once"
        environment = {"BACKSTAY_FAULTS": f"{point},step={KEY.step},once={once}:kill"}
        async with group_of(tmpfs_dir, 3, {1: environment}) as nodes:
            plan = make_plan(nodes, random_volumes(nodes, [[MIB], [MIB], [MIB]], seed=13), m=2)
            (old_pid,) = nodes[1].coders.pids
            results = await encode_all(nodes, plan, deadline_s=20)
            assert (results[1].error_class, results[1].reason) == ("UnavailableError", "coder_died")
            assert once.exists()
            assert_ok(await encode_all(nodes, plan, deadline_s=20))
            assert nodes[1].coders.restart_count == 1
            assert nodes[1].coders.pids != (old_pid,)
            assert leftover_temporaries(nodes) == []

    run(scenario)


def test_a_rebuild_whose_coder_is_killed_can_be_done_again(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        once = tmpfs_dir / "once"
        environment = {"BACKSTAY_FAULTS": f"mid_rebuild,once={once}:kill"}
        async with group_of(tmpfs_dir, 3, {1: environment}) as nodes:
            volumes = random_volumes(nodes, [[MIB], [MIB], [2 * MIB + 1]], seed=14)
            plan = make_plan(nodes, volumes, m=1)
            assert_ok(await encode_all(nodes, plan))
            original = nodes[2].paths.shard(KEY, 2, 3).read_bytes()
            await nodes[2].destroy()
            prepare(nodes[0], volumes[2])
            rebuild = rebuild_of(plan, nodes, {2: nodes[0]})
            first = await decode_all(nodes[:2], rebuild)
            assert "coder_died" in {result.reason for result in first}
            assert_ok(await decode_all(nodes[:2], rebuild))
            assert missing_stripes(nodes[0].paths, plan, member=2, rank=2) == ()
            assert nodes[0].paths.staged(2, 3, volumes[2][0].digest).read_bytes() == original

    run(scenario)


def test_a_fetch_whose_coder_is_killed_can_be_done_again(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        once = tmpfs_dir / "once"
        environment = {"BACKSTAY_FAULTS": f"mid_fetch,rank=0,once={once}:kill"}
        async with group_of(tmpfs_dir, 2, {1: environment}) as nodes:
            (manifest,), _ = random_volumes(nodes, [[MIB], []], seed=15)
            job = fetch_of(manifest, nodes[0].address)
            assert (await nodes[1].coders.run(job)).reason == "coder_died"
            assert_ok([await nodes[1].coders.run(job)])
            assert_ok([await nodes[1].coders.run(verify_of(manifest, is_staged=True))])

    run(scenario)


def test_a_cancelled_job_ends_and_leaves_nothing(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 3) as nodes:
            plan = make_plan(nodes, random_volumes(nodes, [[MIB], [MIB], [MIB]], seed=16), m=2)
            job = asyncio.create_task(nodes[0].coders.run(EncodeStripe(plan=plan, stripe=0, deadline_s=60)))
            await eventually(lambda: bool(leftover_temporaries(nodes)), "node 0 waits for node 1 to store the plan")
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job
            await eventually(lambda: not leftover_temporaries(nodes), "the cancelled job removes its files")

    run(scenario)


def test_a_job_past_its_deadline_says_so(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 3) as nodes:
            plan = make_plan(nodes, random_volumes(nodes, [[9], [9], [9]], seed=17), m=2)
            result = await nodes[0].coders.run(EncodeStripe(plan=plan, stripe=0, deadline_s=0.3))
            # a connection waits no longer than the job may: then it is the peer that was silent for too long
            assert result.error_class == "UnavailableError"
            assert result.reason in ("deadline", "peer_silent")

    run(scenario)


def test_a_frozen_peer_costs_a_deadline_and_not_a_hang(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 2) as nodes:
            (manifest,), _ = random_volumes(nodes, [[MIB], []], seed=18)
            (pid,) = nodes[0].coders.pids
            os.kill(pid, signal.SIGSTOP)
            try:
                job = dataclasses.replace(fetch_of(manifest, nodes[0].address), deadline_s=1.0)
                result = await nodes[1].coders.run(job)
                assert result.error_class == "UnavailableError"
            finally:
                os.kill(pid, signal.SIGCONT)

    run(scenario)


def test_closing_pools_leaves_no_process_and_coders_serve_from_chunk_sized_buffers(tmpfs_dir: Path) -> None:
    async def scenario() -> None:
        async with group_of(tmpfs_dir, 2) as nodes:
            (manifest,), _ = random_volumes(nodes, [[5 * CHUNK_BYTES + 3], []], seed=19)
            assert_ok([await nodes[1].coders.run(fetch_of(manifest, nodes[0].address))])
            pids = [pid for node in nodes for pid in node.coders.pids]
            assert len(pids) == 2
        assert not any(psutil.pid_exists(pid) for pid in pids)

    run(scenario)
