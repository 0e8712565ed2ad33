"""The memory directory on a real tmpfs: adoption, what is refused, what is put aside, what is given back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from backstay.errors import CapacityError, ConfigError, IntegrityError, InvariantError, UsageError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES
from backstay.ids import Generation, SnapshotKey, snapshot_id
from backstayd.core.inventory import geometry
from backstayd.core.messages.decisions import Decision, Outcome
from backstayd.core.messages.plans import FragmentRecord, Member, Plan, VolumeShard
from backstayd.store import admit, limits, remove
from backstayd.store.adopt import GENERATION_NAME, Owner, scan
from backstayd.store.fragments import FragmentWriter
from backstayd.store.paths import FragmentRef, ShardRef
from backstayd.store.published import open_for_trainer
from backstayd.store.record_files import StoredFragment, StoredPlan, make_directory, write_atomically
from backstayd.store.slot_holder import HolderRecord, start_ticks
from backstayd.store.slots import Allocation, Grant, allocate
from backstayd.store.staging import prepare_staging
from backstayd.store.store import Store
from tests.kit.shards import RUN, MadeShard, make_shard
from tests.kit.wording import refuses

ROOT = Path(__file__).resolve().parents[2]
ME = HolderRecord(pid=os.getpid(), start_ticks=start_ticks(os.getpid()))
KEY = SnapshotKey(1, 1)
Opener = Callable[..., Store]


@pytest.fixture
def open_store(tmpfs_dir: Path) -> Iterator[Opener]:
    """Opens the directory; a later call closes the former store first, as a restart does."""
    opened: list[Store] = []

    def open_(**more: object) -> Store:
        for store in opened:
            store.close()
        number = len(opened) + 1
        opened.append(Store(tmpfs_dir / "memory", incarnation=f"{number:016x}", **more))  # type: ignore[arg-type]
        opened[-1].slots.hosted = {(RUN, rank): 1 for rank in range(8)}
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


def assert_equals_a_fresh_look(store: Store) -> None:
    store.check_invariants()
    found = scan(store.memory_dir)
    assert found.runs == store.runs


def grant(store: Store, shard: MadeShard, *, holder: HolderRecord = ME, limit: int = 2) -> Grant:
    found = store.slots.take(
        store.open_run(RUN, uid=os.getuid()),
        rank=shard.manifest.rank,
        step=shard.manifest.step,
        size_bytes=shard.manifest.size_bytes,
        holder=holder,
        limit=limit,
    )
    assert found is not None
    if isinstance(found, Allocation):
        allocate(found)
        found = store.slots.add(found, step=shard.manifest.step, holder=holder)
    return found


def commit(store: Store, shard: MadeShard, **more: object) -> None:
    granted = grant(store, shard, **more)  # type: ignore[arg-type]
    os.pwrite(granted.fd, shard.data, 0)
    store.slots.commit(granted, shard.json)


def decision_of(run: str) -> Decision:
    return Decision(
        decision_id="d" * 32,
        generation=Generation(1, "c"),
        run=run,
        world_id="w",
        world_size=2,
        attempt=1,
        outcome=Outcome.NONE,
    )


def add_plan(store: Store, shards: list[MadeShard], *, m: int = 1) -> Plan:
    """Store a plan over one node per shard and parity of stripe 0 here, as a coder would."""
    manifests = [shard.manifest for shard in shards]
    members = tuple(
        Member(
            node=f"n{manifest.rank}",
            incarnation=f"{manifest.rank:016x}",
            bulk_address="127.0.0.1:1",
            shards=(VolumeShard(rank=manifest.rank, size_bytes=manifest.size_bytes, digest=manifest.digest),),
        )
        for manifest in manifests
    )
    digests = [manifest.digest for manifest in manifests]
    plan = Plan(
        run=RUN,
        snapshot_id=snapshot_id(key=KEY, world_size=len(shards), shard_digests=digests),
        attempt=1,
        step=1,
        world_size=len(shards),
        m=m,
        chunk_bytes=CHUNK_BYTES,
        members=members,
    ).sealed()
    paths = store.paths(RUN)
    make_directory(paths.parity(KEY))
    stored = StoredPlan(plan=plan, manifests=tuple(shard.json for shard in shards))
    write_atomically(paths.plan(KEY, plan.plan_id), json_records.dumps(stored), incarnation=store.incarnation)
    size = geometry.fragment_bytes(plan, 0)
    writer = FragmentWriter(paths, FragmentRef.of(plan, 0, 0), size_bytes=size, incarnation=store.incarnation)
    for chunk in range(writer.chunk_count):
        writer.write(0, [memoryview(bytes(writer.chunk_length(chunk)))])
    writer.commit()
    assert admit.note_fragment(store, RUN, KEY, FragmentRecord(plan_id=plan.plan_id, stripe=0, index=0))
    return plan


def test_every_state_of_the_index_is_what_a_fresh_adoption_finds(open_store: Opener) -> None:
    store = open_store()
    shards = [make_shard(rank=rank, world_size=2) for rank in range(2)]
    assert_equals_a_fresh_look(store)
    grant(store, shards[0])
    assert_equals_a_fresh_look(store)
    commit(store, shards[1])
    assert_equals_a_fresh_look(store)
    plan = add_plan(store, shards)
    assert_equals_a_fresh_look(store)
    used = store.used_bytes
    prepare_staging(
        store.paths(RUN), shards[0].manifest, digest=shards[0].manifest.digest, incarnation=store.incarnation
    )
    admit.note_staged(store, ShardRef.of(RUN, shards[0].manifest))
    assert store.used_bytes == used + shards[0].manifest.size_bytes
    assert_equals_a_fresh_look(store)
    admit.publish_staged(store, ShardRef.of(RUN, shards[0].manifest))
    assert_equals_a_fresh_look(store)
    remove.quarantine_fragment(store, RUN, FragmentRecord(plan_id=plan.plan_id, stripe=0, index=0), reason="flipped")
    remove.quarantine_shard(store, RUN, KEY, rank=1, reason="chunk 3 has crc 1, expected 2")
    assert_equals_a_fresh_look(store)
    remove.drop_plan(store, RUN, plan.plan_id)
    assert_equals_a_fresh_look(store)
    remove.release_snapshot(store, RUN, KEY)
    assert_equals_a_fresh_look(store)
    before = store.runs
    assert open_store().runs == before
    store = open_store()
    store.forget(RUN)
    assert_equals_a_fresh_look(store)
    assert sorted(path.name for path in store.memory_dir.iterdir()) == [".lock"]


DIE = """
import os, sys
sys.path[:0] = [{root!r}, {root!r} + "/client", {root!r} + "/daemon"]
from pathlib import Path
from backstay.ids import SnapshotKey
from backstayd.store import remove
from tests.component import test_store as t
store = t.Store(Path({memory!r}), incarnation="dd" * 8)
store.slots.hosted = {{(t.RUN, 0): 1}}
t.commit(store, t.make_shard())
if {is_release}:
    remove.release_snapshot(store, t.RUN, t.KEY)
"""


@pytest.mark.parametrize("point", ["before_publish", "after_publish", "mid_release"])
def test_a_daemon_killed_at_any_point_leaves_a_shard_whole_or_not_at_all(
    open_store: Opener, tmpfs_dir: Path, point: str
) -> None:
    code = DIE.format(root=str(ROOT), memory=str(tmpfs_dir / "memory"), is_release=point == "mid_release")
    environment = os.environ | {"BACKSTAY_FAULTS": f"{point},step=1,rank=0:kill"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    store = open_store()
    index = store.runs[RUN]
    if point == "after_publish":
        assert list(index.shards) == [(KEY, 0)]
    else:
        assert index.shards == {}
        (slot,) = index.slots.values()
        granted = grant(store, make_shard(step=2))
        assert granted.slot_id == slot.slot_id
    assert_equals_a_fresh_look(store)


def test_a_truncated_shard_is_put_aside_with_its_reason(open_store: Opener) -> None:
    store = open_store()
    commit(store, make_shard())
    os.truncate(store.paths(RUN).shard(KEY, 0, 1), 9000)
    store = open_store()
    assert store.runs[RUN].shards == {}
    (entry,) = store.runs[RUN].quarantined.values()
    assert "9000 bytes, its manifest says" in entry.reason
    assert (entry.attempt, entry.step, entry.rank) == (1, 1, 0)
    assert store.used_bytes == 0
    assert_equals_a_fresh_look(store)
    assert open_store().runs[RUN].quarantined == store.runs[RUN].quarantined


def test_a_shard_of_another_run_in_this_runs_place_is_never_used(open_store: Opener) -> None:
    store = open_store()
    commit(store, make_shard())
    other = make_shard(run="job/other")
    store.paths(RUN).manifest(KEY, 0, 1).write_bytes(json_records.dumps(other.manifest))
    store = open_store()
    assert store.runs[RUN].shards == {}
    (entry,) = store.runs[RUN].quarantined.values()
    assert "is of run job/other" in entry.reason


def test_files_of_another_format_are_left_for_the_release_that_wrote_them(open_store: Opener) -> None:
    store = open_store()
    shards = [make_shard(rank=rank, world_size=2) for rank in range(2)]
    commit(store, shards[0])
    plan = add_plan(store, shards)
    paths = store.paths(RUN)
    files = [paths.manifest(KEY, 0, 2), paths.plan(KEY, plan.plan_id)]
    parity = sorted(paths.parity(KEY).glob(f"plan-{plan.plan_id}.stripe-*"))
    assert parity
    for path in files:
        value = json.loads(path.read_bytes()) | {"format": 9, "shape_that_nobody_knows": 1}
        path.write_bytes(json.dumps({k: v for k, v in value.items() if k != "rank"}).encode())
    store = open_store()
    index = store.runs[RUN]
    assert (index.shards, index.plans, index.fragments, index.quarantined) == ({}, {}, {}, {})
    assert all(path.exists() for path in (*files, *parity, paths.shard(KEY, 0, 2)))
    reasons = {finding.path: finding.reason for finding in store.foreign}
    assert "has format 9, this release reads up to 1" in reasons[files[0]]
    assert files[1] in reasons


def test_a_flipped_manifest_or_record_is_put_aside(open_store: Opener) -> None:
    store = open_store()
    shards = [make_shard(rank=rank, world_size=2) for rank in range(2)]
    commit(store, shards[0])
    plan = add_plan(store, shards)
    paths = store.paths(RUN)
    manifest = bytearray(paths.manifest(KEY, 0, 2).read_bytes())
    manifest[manifest.index(b'"step"') + 1] ^= 0x80
    paths.manifest(KEY, 0, 2).write_bytes(manifest)
    paths.fragment_record(KEY, plan.plan_id, stripe=0, index=0).write_bytes(b"{}")
    store = open_store()
    index = store.runs[RUN]
    assert index.shards == {}
    assert index.fragments == {}
    assert store.corrupt_count == 2
    assert_equals_a_fresh_look(store)


def test_foreign_files_are_reported_left_alone_and_never_used(open_store: Opener, tmpfs_dir: Path) -> None:
    store = open_store()
    commit(store, make_shard())
    memory, root = store.memory_dir, store.paths(RUN).root
    strangers = [
        memory / "notes.txt",
        root / "core.123",
        store.paths(RUN).snapshot(KEY) / "checkpoint.pt",
        memory / "a b",
    ]
    for path in strangers:
        path.write_text("not ours")
    (root / "attempt-0001/step-1").mkdir()
    link = store.paths(RUN).shard(KEY, 1, 2)
    link.symlink_to("/etc/passwd")
    store = open_store()
    assert {finding.path for finding in store.foreign} == {*strangers, root / "attempt-0001/step-1", link}
    assert all(path.read_text() == "not ours" for path in strangers)
    assert list(store.runs[RUN].shards) == [(KEY, 0)]


def _directory_at(path: Path) -> None:
    path.unlink(missing_ok=True)
    (path / "inside").mkdir(parents=True)


def _pipe_at(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _link_at(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("put", [_directory_at, _pipe_at, _link_at])
@pytest.mark.parametrize("what", ["generation", "decision", "owner", "plan", "fragment", "manifest", "holder"])
def test_what_is_no_file_in_the_place_of_a_record_does_not_stop_the_daemon(
    open_store: Opener, what: str, put: Callable[[Path], None]
) -> None:
    store = open_store()
    shards = [make_shard(rank=rank, world_size=2) for rank in range(2)]
    for shard in shards:
        commit(store, shard)
    plan = add_plan(store, shards)
    store.record_decision(decision_of(RUN))
    assert store.admit_generation(Generation(3, "c"))
    paths = store.paths(RUN)
    put(
        {
            "generation": store.memory_dir / GENERATION_NAME,
            "decision": paths.decision,
            "owner": paths.owner,
            "plan": paths.plan(KEY, plan.plan_id),
            "fragment": paths.fragment(KEY, plan.plan_id, stripe=0, index=0),
            "manifest": paths.manifest(KEY, 0, 2),
            "holder": next(paths.slots.glob("holder-*")),
        }[what]
    )
    store = open_store()
    assert (KEY, 1) in store.index(RUN).shards
    commit(store, make_shard(rank=1, world_size=2, step=2))
    store.record_decision(decision_of(RUN))
    assert store.admit_generation(Generation(4, "c"))
    assert_equals_a_fresh_look(open_store())


def test_a_decision_of_another_run_or_parity_beyond_the_plan_is_put_aside(open_store: Opener) -> None:
    store = open_store()
    plan = add_plan(store, [make_shard(rank=rank, world_size=2) for rank in range(2)])
    paths = store.paths(RUN)
    for stripe, index in ((99, 0), (0, 7)):
        path = paths.fragment(KEY, plan.plan_id, stripe=stripe, index=index)
        shutil.copy(paths.fragment(KEY, plan.plan_id, stripe=0, index=0), path)
        stored = json_records.loads(
            StoredFragment, paths.fragment_record(KEY, plan.plan_id, stripe=0, index=0).read_bytes()
        )
        lie = replace(stored, stripe=stripe, index=index)
        paths.fragment_record(KEY, plan.plan_id, stripe=stripe, index=index).write_bytes(json_records.dumps(lie))
    paths.decision.write_bytes(json_records.dumps(decision_of("job/other")))
    index = open_store().index(RUN)
    assert set(index.fragments) == {FragmentRecord(plan_id=plan.plan_id, stripe=0, index=0)}
    assert index.decision is None
    assert len(index.quarantined) == 3


def test_links_in_the_memory_directory_are_not_written_through(open_store: Opener, tmpfs_dir: Path) -> None:
    store = open_store()
    commit(store, make_shard())
    elsewhere = tmpfs_dir / "elsewhere"
    elsewhere.mkdir()
    for path in (store.paths(RUN).quarantine, store.paths(RUN).slots, store.paths(RUN).staging):
        shutil.rmtree(path, ignore_errors=True)
        path.symlink_to(elsewhere)
    store.paths(RUN).decision.write_bytes(b"{")
    store = open_store()
    commit(store, make_shard(step=2))
    assert not list(elsewhere.iterdir())


def test_a_job_may_be_named_like_one_of_our_files(open_store: Opener) -> None:
    for name in ("gpt.tmp", "generation.json"):
        open_store().open_run(f"{name}/run", uid=7)
    store = open_store()
    assert store.admit_generation(Generation(5, "c"))
    assert {"gpt.tmp/run", "generation.json/run"} <= set(open_store().runs)


def test_a_directory_of_another_user_is_refused(tmpfs_dir: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a directory of another user")
    (tmpfs_dir / "theirs").mkdir()
    os.chown(tmpfs_dir / "theirs", 4242, 4242)
    with refuses(ConfigError, "bad_memory_dir", 4242):
        Store(tmpfs_dir / "theirs", incarnation="0" * 16)


def test_leftovers_of_an_older_daemon_are_removed(open_store: Opener) -> None:
    store = open_store()
    commit(store, make_shard())
    paths = store.paths(RUN)
    leftovers = [
        store.memory_dir / ".generation.json.1-1.aa.tmp",
        paths.snapshot(KEY) / "rank-00000-of-00001.manifest.json.1-1.aa.tmp",
        paths.slots / "rank-00000.2.aa.tmp",
    ]
    make_directory(paths.staging)
    leftovers.append(paths.staged(3, 4, "ab" * 32))  # without its manifest
    for path in leftovers:
        path.write_bytes(b"x" * 5000)
    open_store()
    assert not any(path.exists() for path in leftovers)


def test_a_fragment_published_while_its_plan_is_dropped_leaves_nothing(open_store: Opener) -> None:
    store = open_store()
    shards = [make_shard(rank=rank, world_size=2) for rank in range(2)]
    plan = add_plan(store, shards)
    path = store.paths(RUN).fragment(KEY, plan.plan_id, stripe=0, index=0)
    record_path = store.paths(RUN).fragment_record(KEY, plan.plan_id, stripe=0, index=0)
    data, stored = path.read_bytes(), record_path.read_bytes()
    assert remove.drop_plan(store, RUN, plan.plan_id)
    make_directory(path.parent)
    path.write_bytes(data)  # its writer had looked for the plan just before
    record_path.write_bytes(stored)
    late = FragmentRecord(plan_id=plan.plan_id, stripe=0, index=0)
    assert not admit.note_fragment(store, RUN, KEY, late)
    assert not path.parent.exists()
    assert_equals_a_fresh_look(store)


def test_staging_with_its_manifest_is_kept_for_the_rebuild_that_fills_it(open_store: Opener) -> None:
    store = open_store()
    shard = make_shard(rank=1, world_size=2)
    prepare_staging(store.paths(RUN), shard.manifest, digest=shard.manifest.digest, incarnation=store.incarnation)
    marker = store.paths(RUN).staged_stripe(1, 2, digest=shard.manifest.digest, stripe=2)
    marker.touch()
    store = open_store()
    assert list(store.runs[RUN].staged) == [(1, shard.manifest.digest[:16])]
    assert marker.exists()


def test_the_highest_generation_survives_a_restart(open_store: Opener) -> None:
    store = open_store()
    assert store.admit_generation(Generation(7, "aa"))
    store = open_store()
    assert not store.admit_generation(Generation(6, "bb"))
    assert not store.admit_generation(Generation(7, "bb"))
    assert store.admit_generation(Generation(7, "aa"))
    assert store.admit_generation(Generation(8, "bb"))


def test_a_run_belongs_to_the_user_who_began_it_also_after_a_restart(open_store: Opener) -> None:
    open_store().open_run(RUN, uid=1001)
    store = open_store()
    store.open_run(RUN, uid=1001)
    with refuses(UsageError, "not_owner", 1001, 1002):
        store.open_run(RUN, uid=1002)
    assert json_records.loads(Owner, store.paths(RUN).owner.read_bytes()) == Owner(uid=1001)


def test_a_slot_with_a_reader_is_not_filled_again(open_store: Opener) -> None:
    store = open_store(reader_wait_s=0.0)
    commit(store, make_shard())
    slot_id = store.runs[RUN].shards[KEY, 0].slot_id
    reader, _ = open_for_trainer(store.index(RUN), store.paths(RUN), KEY, rank=0)
    expected = os.pread(reader, 1 << 20, 0)
    remove.release_snapshot(store, RUN, KEY)
    granted = grant(store, make_shard(step=2))
    assert granted.slot_id != slot_id  # the reader keeps it; it was given up
    os.pwrite(granted.fd, make_shard(step=2).data, 0)
    assert os.pread(reader, 1 << 20, 0) == expected
    os.close(reader)
    assert_equals_a_fresh_look(store)


def test_a_slot_passes_to_another_process_only_when_the_former_is_dead(open_store: Opener) -> None:
    store = open_store()
    child = subprocess.Popen(["sleep", "60"])
    other = HolderRecord(pid=child.pid, start_ticks=start_ticks(child.pid))
    first = grant(store, make_shard(), holder=other)
    store.slots.put_back(first)
    store = open_store()  # a new daemon still knows who holds it
    second = grant(store, make_shard(step=2))
    assert second.slot_id != first.slot_id
    child.kill()
    child.wait()
    third = grant(store, make_shard(step=3))
    assert third.slot_id == first.slot_id
    assert_equals_a_fresh_look(store)


def test_unused_slots_are_given_up_for_what_needs_room(open_store: Opener) -> None:
    size = make_shard().manifest.size_bytes
    store = open_store(quota_bytes=3 * size)
    first = grant(store, make_shard())
    store.slots.put_back(first)
    store.require_room(2 * size, "staging")
    assert len(store.runs[RUN].slots) == 1
    with refuses(CapacityError, "no_room", 3 * size, f"{2 * size} of {3 * size}"):
        store.require_room(3 * size, "staging")
    store.slots.hosted = {}
    child = subprocess.Popen(["sleep", "60"])
    child.kill()
    child.wait()
    store.runs[RUN].holders.clear()
    store.require_room(3 * size, "staging")
    assert store.runs[RUN].slots == {}


@pytest.mark.parametrize("is_v2", [True, False])
def test_the_cgroup_above_the_daemon_counts(tmpfs_dir: Path, is_v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    own = (
        next(
            line.split(":", 2)[2]
            for line in Path("/proc/self/cgroup").read_text().splitlines()
            if ("memory" in line.split(":")[1].split(",") if not is_v2 else line.startswith("0::"))
        )
        if _has_cgroup(is_v2)
        else pytest.skip("no such cgroup hierarchy here")
    )
    root = tmpfs_dir / "cgroup"
    base = root if is_v2 else root / "memory"
    leaf = base / own.lstrip("/")
    leaf.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if is_v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for directory, limit, usage in ((leaf, 1 << 63, 0), (base, 10_000_000, 4_000_000)):
        (directory / names[0]).write_text(f"{limit}\n")
        (directory / names[1]).write_text(f"{usage}\n")
    (base / "memory.stat").write_text("anon 1\ninactive_file 1000000\ntotal_inactive_file 1000000\n")
    found = limits.limits(tmpfs_dir, quota_bytes=0, used_bytes=0, cgroup_root=root)
    cgroup = [limit for limit in found if limit.name.startswith("cgroup")]
    assert [(limit.total_bytes, limit.free_bytes) for limit in cgroup] == [(10_000_000, 7_000_000)]


def _has_cgroup(is_v2: bool) -> bool:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return any(line.startswith("0::") if is_v2 else "memory" in line.split(":")[1].split(",") for line in lines)


def test_invariants_can_fail(open_store: Opener) -> None:
    store = open_store()
    commit(store, make_shard())
    index = store.runs[RUN]
    held = index.shards[KEY, 0]
    index.shards[SnapshotKey(1, 2), 0] = held
    with pytest.raises(InvariantError):
        store.check_invariants()
    del index.shards[SnapshotKey(1, 2), 0]


def test_a_commit_twice_or_with_a_lying_manifest_changes_nothing(open_store: Opener) -> None:
    store = open_store()
    commit(store, make_shard())
    granted = grant(store, make_shard(step=1))
    os.pwrite(granted.fd, make_shard().data, 0)
    with refuses(UsageError, "usage", 1):
        store.slots.commit(granted, make_shard().json)
    second = make_shard(step=2)
    lying = second.json | {"chunk_crcs": "00000000" * second.manifest.chunk_count}
    os.pwrite(granted.fd, second.data, 0)
    with refuses(IntegrityError, "bad_chunk", 0):
        store.slots.commit(granted, lying)
    assert_equals_a_fresh_look(store)


def test_publishing_a_staged_shard_twice_is_harmless_and_another_history_gives_way(open_store: Opener) -> None:
    store = open_store()
    commit(store, make_shard(seed=1))
    wanted = make_shard(seed=2)
    for _ in range(2):
        prepare_staging(store.paths(RUN), wanted.manifest, digest=wanted.manifest.digest, incarnation=store.incarnation)
        part = store.paths(RUN).staged(0, 1, wanted.manifest.digest)
        part.write_bytes(wanted.data)
        admit.publish_staged(store, ShardRef.of(RUN, wanted.manifest))
        assert_equals_a_fresh_look(store)
    assert store.paths(RUN).shard(KEY, 0, 1).read_bytes() == wanted.data
    shutil.rmtree(store.paths(RUN).staging)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")
def test_a_manifest_without_room_leaves_the_slot_as_it_was(open_store: Opener, tmpfs_dir: Path) -> None:
    memory = tmpfs_dir / "memory"
    memory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "backstay-test", str(memory)], check=True)
    try:
        store = open_store()
        shard = make_shard()
        granted = grant(store, shard)
        os.pwrite(granted.fd, shard.data, 0)
        make_directory(store.paths(RUN).snapshot(KEY))
        filler = memory / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(1 << 20))
        with refuses(CapacityError, "no_space"):
            store.slots.commit(granted, shard.json)
        assert_equals_a_fresh_look(store)
        filler.unlink()
        store.slots.commit(granted, shard.json)
        assert_equals_a_fresh_look(store)
        store.close()
    finally:
        subprocess.run(["umount", str(memory)], check=True)
