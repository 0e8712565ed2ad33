"""Directories on durable storage: the kernel's file systems, a real S3 server, and any other through fsspec."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from backstay.errors import BackstayError, ConfigError, IntegrityError, SnapshotNotFoundError, UnavailableError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES
from backstayd.coder.context import CorruptSourceError, JobContext
from backstayd.coder.jobs import CoderEvent, FetchChunks, FetchManifests, FetchShard
from backstayd.coder.transfer.fetch import run_fetch, run_fetch_chunks, run_fetch_manifests
from backstayd.core.inventory.durable_names import manifest_name, shard_name
from backstayd.durable.open import open_place
from backstayd.durable.place import Place
from backstayd.durable.publish import publish_shard
from backstayd.durable.reader import open_shard
from backstayd.store.paths import ShardRef
from backstayd.store.published import find_manifest
from backstayd.store.record_files import ShardChunks, parse_manifest
from backstayd.store.staging import prepare_sparse
from tests.kit.object_store import ObjectStore, object_store
from tests.kit.shards import MadeShard, make_shard
from tests.kit.wording import refuses

pytest.importorskip("s3fs")
KINDS = ("local", "fsspec", "s3")
SNAPSHOT = "job/run/attempt-0001/step-00000012"
MIB = 1 << 20


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with pytest.MonkeyPatch.context() as patch, object_store() as store:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        yield store


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path, s3: ObjectStore) -> str:
    if request.param == "s3":
        s3.empty()
        s3.make_bucket()
        return s3.url
    return f"{'file' if request.param == 'local' else 'local'}://{tmp_path}/storage"


@dataclass
class Source:
    """A shard in this process; ``cut_after`` bytes it fails."""

    shard: MadeShard
    cut_after: int = 1 << 60
    spent: int = 0
    done: int = 0
    offsets: list[int] = field(default_factory=list)

    @property
    def chunks(self) -> ShardChunks:
        return parse_manifest(json_records.dumps(self.shard.manifest), digest=self.shard.manifest.digest)

    def read_verified(self, offset: int, view: memoryview) -> None:
        view[:] = self.shard.data[offset : offset + len(view)]

    def spend(self, size_bytes: int) -> None:
        if self.spent + size_bytes > self.cut_after:
            raise UnavailableError("the daemon is gone", reason="cancelled")
        self.spent += size_bytes

    def note_done(self, size_bytes: int) -> None:
        self.done += size_bytes


def put(place: Place, shard: MadeShard, *, mark: str = "n0") -> Source:
    """Upload a shard and its manifest."""
    source = Source(shard)
    place.put_shard(shard_name(0, 1), source, mark=mark)
    place.put_small(manifest_name(0, 1), json_records.dumps(shard.manifest))
    return source


def test_a_shard_comes_back_as_it_was_put_and_each_byte_is_sent_once(url: str) -> None:
    shard = make_shard(step=12, payload_bytes=20 * MIB + 12345)
    source = put(open_place(f"{url}/{SNAPSHOT}"), shard)
    assert (source.spent, source.done) == (len(shard.data), len(shard.data))
    opened = open_shard(f"{url}/{SNAPSHOT}", rank=0, world_size=1, digest=shard.manifest.digest)
    try:
        whole = memoryview(bytearray(len(shard.data)))
        opened.read_into(0, whole)
        assert bytes(whole) == shard.data
        first, last = memoryview(bytearray(300)), memoryview(bytearray(1))
        opened.read_ranges([(1000, first), (len(shard.data) - 1, last)])
        assert (bytes(first), bytes(last)) == (shard.data[1000:1300], shard.data[-1:])
        assert json_records.dumps(shard.manifest) == opened.manifest_bytes
        with pytest.raises(IntegrityError):
            opened.read_into(len(shard.data) - 10, memoryview(bytearray(20)))
    finally:
        opened.close()


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_an_upload_that_was_cut_off_goes_on_where_it_stopped(kind: str, tmp_path: Path, s3: ObjectStore) -> None:
    url = s3.url if kind == "s3" else f"file://{tmp_path}"
    place = open_place(f"{url}/cut/{SNAPSHOT}")
    shard = make_shard(step=12, payload_bytes=40 * MIB)
    with refuses(UnavailableError, "cancelled"):
        place.put_shard(shard_name(0, 1), Source(shard, cut_after=25 * MIB), mark="n0")
    assert place.size_of(shard_name(0, 1)) is None
    source = put(place, shard)
    assert 0 < source.spent < len(shard.data), "only what was missing is sent"
    assert source.done == len(shard.data)
    opened = open_shard(place.url, rank=0, world_size=1, digest=shard.manifest.digest)
    whole = memoryview(bytearray(len(shard.data)))
    opened.read_into(0, whole)
    opened.close()
    assert bytes(whole) == shard.data
    assert "<Upload>" not in s3.unfinished()


def test_a_part_file_with_wrong_bytes_is_written_again_from_there(tmp_path: Path) -> None:
    place = open_place(f"file://{tmp_path}/{SNAPSHOT}")
    shard = make_shard(step=12, payload_bytes=12 * MIB)
    with pytest.raises(UnavailableError):
        place.put_shard(shard_name(0, 1), Source(shard, cut_after=9 * MIB), mark="n0")
    (part,) = (tmp_path / SNAPSHOT).glob(".*.part")
    with part.open("r+b") as file:
        file.seek(5 * MIB)
        file.write(b"spoilt")
    source = put(place, shard)
    assert source.spent >= len(shard.data) - 5 * MIB
    assert (tmp_path / SNAPSHOT / shard_name(0, 1)).read_bytes() == shard.data
    assert not list((tmp_path / SNAPSHOT).glob(".*"))


def test_parts_of_other_bytes_are_not_taken_for_this_shards(s3: ObjectStore) -> None:
    place = open_place(f"{s3.url}/other/{SNAPSHOT}")
    old, new = (make_shard(step=12, payload_bytes=20 * MIB, seed=seed) for seed in (1, 2))
    with pytest.raises(UnavailableError):
        place.put_shard(shard_name(0, 1), Source(old, cut_after=17 * MIB), mark="n0")
    assert put(place, new).spent == len(new.data)
    opened = open_shard(place.url, rank=0, world_size=1, digest=new.manifest.digest)
    whole = memoryview(bytearray(len(new.data)))
    opened.read_into(0, whole)
    opened.close()
    assert bytes(whole) == new.data


def publish(place: Place, shard: MadeShard, *, mark: str = "n0") -> None:
    raw = json_records.dumps(shard.manifest)
    publish_shard(place, rank=0, source=Source(shard), manifest=raw, mark=mark, check=lambda: None)


def bytes_there(place: Place, shard: MadeShard) -> bytes:
    opened = open_shard(place.url, rank=0, world_size=1, digest=shard.manifest.digest)
    whole = memoryview(bytearray(len(shard.data)))
    opened.read_into(0, whole)
    opened.close()
    return bytes(whole)


def test_a_late_upload_of_another_history_replaces_nothing(url: str) -> None:
    """Two clusters under one run_id reach the same step of the same attempt."""
    place = open_place(f"{url}/{SNAPSHOT}")
    first, late = (make_shard(step=12, payload_bytes=9 * MIB, seed=seed) for seed in (1, 2))
    publish(place, first)
    with refuses(UnavailableError, "occupied") as caught:
        publish(place, late, mark="n1")
    assert caught.value.reason == "occupied"
    assert not place.put_shard(shard_name(0, 1), Source(late), mark="n1")
    assert bytes_there(place, first) == first.data
    publish(place, first)  # again, as after an answer that was lost
    assert {entry.name for entry in place.list()} == {shard_name(0, 1), manifest_name(0, 1)}


def test_an_upload_that_another_history_overtakes_on_its_way_replaces_nothing(url: str) -> None:
    place = open_place(f"{url}/{SNAPSHOT}")
    first, late = (make_shard(step=12, payload_bytes=18 * MIB, seed=seed) for seed in (1, 2))

    class Overtaken(Source):
        def spend(self, size_bytes: int) -> None:
            super().spend(size_bytes)
            if self.spent >= 16 * MIB and place.size_of(shard_name(0, 1)) is None:
                publish(place, first)

    with contextlib.suppress(
        UnavailableError
    ):  # S3: its unfinished upload is gone, too; the next try finds it occupied
        assert not place.put_shard(shard_name(0, 1), Overtaken(late), mark="n1")
    with refuses(UnavailableError, "occupied"):
        publish(place, late, mark="n1")
    assert bytes_there(place, first) == first.data


def test_a_shard_whose_writer_died_before_the_manifest_is_completed_by_another_and_not_by_one_of_other_bytes(
    url: str,
) -> None:
    place = open_place(f"{url}/{SNAPSHOT}")
    first, other = (make_shard(step=12, payload_bytes=5 * MIB, seed=seed) for seed in (1, 2))
    assert place.put_shard(shard_name(0, 1), Source(first), mark="n0")
    with refuses(UnavailableError, "occupied"):
        publish(place, other, mark="n1")
    publish(place, first, mark="n2")
    assert bytes_there(place, first) == first.data


def test_a_record_is_created_once(url: str) -> None:
    place = open_place(f"{url}/{SNAPSHOT}")
    assert place.create("snapshot.json", b"first")
    assert not place.create("snapshot.json", b"second")
    assert place.read_small("snapshot.json") == b"first"


def test_small_files_are_replaced_listed_and_removed(url: str) -> None:
    run = open_place(f"{url}/job/run")
    assert (run.list(), run.size_of("attempt-0001")) == ([], None)
    place = open_place(f"{url}/{SNAPSHOT}")
    place.put_small("a.json", b"1")
    place.put_small("a.json", b"22")
    place.put_small("b.json", b"333")
    assert sorted((entry.name, entry.size_bytes) for entry in place.list()) == [("a.json", 2), ("b.json", 3)]
    assert [(entry.name, entry.is_directory) for entry in run.list()] == [("attempt-0001", True)]
    place.remove("a.json")
    place.remove("a.json")
    assert place.size_of("a.json") is None
    with pytest.raises(SnapshotNotFoundError):
        place.read_small("a.json")
    run.remove_tree("attempt-0001/step-00000012")
    run.remove_tree("attempt-0001/step-00000012")
    assert [entry for entry in run.list("attempt-0001") if not entry.is_directory] == []
    assert place.list() == []


def test_a_shard_without_manifest_with_another_or_cut_short_is_refused(url: str) -> None:
    shard, other = make_shard(step=12), make_shard(step=12, seed=1)
    place = open_place(f"{url}/{SNAPSHOT}")
    place.put_shard(shard_name(0, 1), Source(shard), mark="n0")
    arguments = {"rank": 0, "world_size": 1, "digest": shard.manifest.digest}
    with pytest.raises(SnapshotNotFoundError):
        open_shard(place.url, **arguments)
    place.put_small(manifest_name(0, 1), json_records.dumps(other.manifest))
    with pytest.raises(IntegrityError, match="digest"):
        open_shard(place.url, **arguments)
    place.put_small(manifest_name(0, 1), json_records.dumps(shard.manifest))
    place.put_small(shard_name(0, 1), shard.data[:-1])
    with pytest.raises(IntegrityError, match=f"has {len(shard.data) - 1} bytes"):
        open_shard(place.url, **arguments)


def test_a_root_that_is_not_there_is_named_and_not_made(tmp_path: Path, s3: ObjectStore) -> None:
    with refuses(UnavailableError, "no_root") as local:
        open_place(f"file://{tmp_path}/not-mounted").require_root()
    with refuses(UnavailableError, "no_root") as remote:
        open_place("s3://nowhere/x").require_root()
    assert (local.value.reason, remote.value.reason) == ("no_root", "no_root")
    assert not (tmp_path / "not-mounted").exists()
    open_place(f"file://{tmp_path}").require_root()
    s3.make_bucket()
    open_place(s3.url).require_root()


def test_a_link_to_what_was_pruned_does_not_make_a_runs_directory_look_empty(tmp_path: Path) -> None:
    """Somebody's ``latest`` that dangles: a survey that sees nothing would have the run begin from scratch."""
    run = tmp_path / "job" / "run"
    (run / "attempt-0001" / "step-00000012").mkdir(parents=True)
    (run / "latest").symlink_to("attempt-0001/step-00000008")
    place = open_place(f"file://{tmp_path}/job/run")
    assert [entry.name for entry in place.list()] == ["attempt-0001"]


@pytest.mark.parametrize("url", ["file:///mnt/ckpt?x=1", "file:///mnt/ckpt#1", "file://mnt/ckpt", "file://mnt"])
def test_a_file_url_of_which_a_part_would_be_dropped_is_refused(url: str) -> None:
    with refuses(ConfigError, "bad_url"):
        open_place(f"{url}/job/run")


def test_a_path_with_blanks_and_signs_is_taken_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "a b%#?é").mkdir()
    for url in (f"{tmp_path}/a b%#?é", f"file://{tmp_path}/a%20b%25%23%3F%C3%A9"):
        open_place(url).require_root()
        open_place(f"{url}/job/run").put_small("x", b"1")
        assert (tmp_path / "a b%#?é" / "job" / "run" / "x").read_bytes() == b"1"


def test_a_scheme_or_package_that_is_missing_is_named_with_the_next_step() -> None:
    with refuses(ConfigError, "unknown_scheme"):
        open_place("foo://bar/x")
    with refuses(ConfigError, "missing_package"):
        open_place("gs://bucket/x")


@pytest.mark.skipif(os.geteuid() == 0 and not hasattr(os, "seteuid"), reason="needs another user")
def test_no_permission_says_who_needs_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    target = tmp_path / "locked"
    target.mkdir(mode=0o500)
    is_root = os.geteuid() == 0
    for parent in [tmp_path, *tmp_path.parents]:
        if is_root and parent.stat().st_mode & 0o005 != 0o005 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(BackstayError, match="let the user that runs backstayd") as caught:
            open_place(f"file://{target}/{SNAPSHOT}").put_small("x", b"1")
    finally:
        if is_root:
            os.seteuid(0)
    assert caught.value.reason == "no_permission"


def test_random_cuts_never_leave_a_shard_that_is_not_whole(tmp_path: Path) -> None:
    generator = random.Random(7)
    shard = make_shard(step=12, payload_bytes=9 * MIB + 77)
    place = open_place(f"file://{tmp_path}/{SNAPSHOT}")
    for _ in range(12):
        try:
            place.put_shard(shard_name(0, 1), Source(shard, cut_after=generator.randrange(0, 12 * MIB)), mark="n0")
        except UnavailableError:
            assert place.size_of(shard_name(0, 1)) in (None, len(shard.data))
    put(place, shard)
    assert (tmp_path / SNAPSHOT / shard_name(0, 1)).read_bytes() == shard.data


def test_a_shard_and_chunks_of_it_are_fetched_verified_and_a_damaged_one_is_named(url: str, tmp_path: Path) -> None:
    shard, memory = make_shard(step=12, payload_bytes=9 * MIB + 12345), tmp_path / "memory"
    place = open_place(f"{url}/{SNAPSHOT}")
    put(place, shard)
    ref = ShardRef.of(shard.manifest.run, shard.manifest)

    def context() -> JobContext:
        return JobContext(memory_dir=memory, incarnation="i", deadline_s=60.0, emit=events.append)

    events: list[CoderEvent] = []
    paths = context().paths(ref.run)
    whole = FetchShard(shard=ref, size_bytes=len(shard.data), url=place.url, deadline_s=60.0)
    run_fetch(context(), whole)
    assert paths.staged(0, 1, ref.digest).read_bytes() == shard.data
    assert events == [CoderEvent(kind="shard_staged", shard=ref)]

    run_fetch_manifests(context(), FetchManifests(shards=(ref,), url=place.url, deadline_s=60.0))
    prepare_sparse(paths, find_manifest(paths, ref), digest=ref.digest, incarnation="i")
    last = -(-len(shard.data) // CHUNK_BYTES) - 1
    some = FetchChunks(shard=ref, firsts=(1, last), counts=(3, 1), url=place.url, deadline_s=60.0)
    done = context()
    run_fetch_chunks(done, some)
    assert done.done_bytes == 3 * CHUNK_BYTES + len(shard.data) - last * CHUNK_BYTES
    data = paths.sparse(0, 1, ref.digest).read_bytes()
    assert data[CHUNK_BYTES : 4 * CHUNK_BYTES] == shard.data[CHUNK_BYTES : 4 * CHUNK_BYTES]
    assert data[last * CHUNK_BYTES :] == shard.data[last * CHUNK_BYTES :]
    assert data[4 * CHUNK_BYTES : last * CHUNK_BYTES].strip(b"\0") == b"", "what was not asked for is a hole"

    damaged = bytearray(shard.data)
    damaged[5 * MIB] ^= 1
    place.put_small(shard_name(0, 1), bytes(damaged))
    failed = context()
    with pytest.raises(CorruptSourceError, match=r"\b20\b"):
        run_fetch(failed, whole)
    assert [(corrupt.node, corrupt.shard) for corrupt in failed.corrupt] == [(place.url, ref)]
