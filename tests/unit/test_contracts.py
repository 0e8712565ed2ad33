"""The records that every part speaks: they survive JSON, refuse what is malformed, and order events as promised."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backstay import ids
from backstay.errors import IntegrityError, UsageError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest, TensorEntry
from backstay.ids import Generation, RunKey, SnapshotKey
from backstay.protocol import framing, messages
from backstayd.core.messages.decisions import Decision, Outcome
from backstayd.core.messages.plans import Member, Plan, VolumeShard
from backstayd.core.messages.report import NodeIdentity, NodeReport, RunReport
from tests.kit.wording import refuses

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True)
hashes = st.text("0123456789abcdef", min_size=64, max_size=64)


def a_manifest(*, size_bytes: int = CHUNK_BYTES + 1) -> Manifest:
    entry = TensorEntry(
        name="model.w",
        dtype="F32",
        shape=(2, 3),
        torch_dtype="torch.float32",
        offsets=(0, 0),
        global_shape=(4, 3),
        begin=4096,
        end=4120,
        crc=7,
    )
    return Manifest(
        run="default/gpt",
        attempt=1,
        step=7,
        rank=0,
        world_size=2,
        world_id="w",
        size_bytes=size_bytes,
        header_bytes=4096,
        chunk_crcs="0000000a" * -(-size_bytes // CHUNK_BYTES),
        tensors=(entry,),
        aliases={"model.tied": "model.w"},
    )


def a_plan() -> Plan:
    members = tuple(
        Member(
            node=f"n{index}",
            incarnation=f"{index:016x}",
            bulk_address=f"10.0.0.{index}:1",
            shards=(VolumeShard(rank=index, size_bytes=10, digest="ab" * 32),),
        )
        for index in range(3)
    )
    return Plan(
        run="default/gpt",
        snapshot_id="cd" * 32,
        attempt=1,
        step=7,
        world_size=3,
        m=1,
        chunk_bytes=CHUNK_BYTES,
        members=members,
    ).sealed()


def test_a_deep_record_comes_back_from_json_as_it_was() -> None:
    decision = Decision(
        decision_id="d",
        generation=Generation(3, "c"),
        run="default/gpt",
        world_id="w",
        world_size=2,
        attempt=2,
        outcome=Outcome.EXACT,
    )
    node = NodeIdentity(name="n1", incarnation="1", bulk_address="10.0.0.1:1")
    runs = (RunReport(run="default/gpt", plans=(a_plan(),), decision=decision),)
    report = NodeReport(node=node, sequence=9, generation=Generation(3, "c"), runs=runs)
    assert json_records.loads(NodeReport, json_records.dumps(report)) == report


def test_unknown_fields_are_ignored_and_missing_ones_take_their_defaults() -> None:
    found = json_records.from_json(messages.Reserve, {"step": 3, "size_bytes": 4096, "of_a_newer_version": [1]})
    assert found == messages.Reserve(step=3, size_bytes=4096)


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"step": "3", "size_bytes": 1},
        {"step": True, "size_bytes": 1},
        {"size_bytes": 1},
        {"step": 3, "size_bytes": None},
        {"step": 3, "size_bytes": 1, "known_slots": 5},
        {"step": 3, "size_bytes": 1, "known_slots": [5]},
    ],
)
def test_a_malformed_record_is_an_integrity_error(value: object) -> None:
    with refuses(IntegrityError, "bad_record"):
        json_records.from_json(messages.Reserve, value)


@given(st.binary(max_size=200))
def test_no_bytes_make_a_frame_fail_in_another_way(payload: bytes) -> None:
    try:
        framing.decode_payload(payload)
    except IntegrityError as error:
        assert error.reason in ("bad_frame", "bad_record")  # noqa: PT017 - most inputs are refused, none may crash


def test_every_field_of_a_manifest_is_part_of_its_digest() -> None:
    manifest = a_manifest()
    changed = [
        replace(manifest, run="default/other"),
        replace(manifest, attempt=2),
        replace(manifest, step=8),
        replace(manifest, rank=1),
        replace(manifest, world_size=3),
        replace(manifest, world_id="v"),
        replace(manifest, chunk_crcs="0000000b" * 2),
        replace(manifest, tensors=()),
        replace(manifest, aliases={}),
        replace(manifest, model_signature="s"),
    ]
    digests = {other.digest for other in [manifest, *changed]}
    assert len(digests) == 1 + len(changed)
    assert json_records.loads(Manifest, json_records.dumps(manifest)).digest == manifest.digest


@pytest.mark.parametrize(
    "broken", [{"format": 2}, {"chunk_bytes": 4096}, {"chunk_crcs": "0000000a"}, {"chunk_crcs": "0000000a" * 3}]
)
def test_a_manifest_that_contradicts_itself_is_refused(broken: dict[str, object]) -> None:
    a_manifest().check()
    with pytest.raises(IntegrityError):
        replace(a_manifest(), **broken).check()  # type: ignore[arg-type]


def test_the_last_chunk_is_as_long_as_what_is_left() -> None:
    manifest = a_manifest(size_bytes=CHUNK_BYTES + 1)
    assert [manifest.chunk_length(index) for index in range(manifest.chunk_count)] == [CHUNK_BYTES, 1]


def test_a_plan_is_known_by_all_of_its_content() -> None:
    plan = a_plan()
    assert plan.is_sealed()
    restarted = replace(plan.members[0], incarnation="f" * 16)
    for other in (
        replace(plan, m=2),
        replace(plan, snapshot_id="ef" * 32),
        replace(plan, members=plan.members[::-1]),
        replace(plan, members=(restarted, *plan.members[1:])),
    ):
        assert not other.is_sealed()
        assert other.sealed().plan_id != plan.plan_id


def test_a_generation_admits_higher_numbers_and_itself_and_nothing_else() -> None:
    seen = Generation(5, "a")
    assert seen.admits(seen)
    assert seen.admits(Generation(6, "b"))
    assert not seen.admits(Generation(5, "b")), "the same number of another coordinator"
    assert not seen.admits(Generation(4, "a"))


@given(st.lists(st.builds(Generation, st.integers(0, 3), st.sampled_from("ab")), max_size=12))
def test_who_obeys_only_admitted_generations_never_goes_back(offers: list[Generation]) -> None:
    seen, obeyed = Generation(), [Generation()]
    for offer in offers:
        if seen.admits(offer):
            seen = offer
            obeyed.append(offer)
    numbers = [generation.number for generation in obeyed]
    assert numbers == sorted(numbers)
    for before, after in itertools.pairwise(obeyed):
        assert after == before or after.number > before.number


def test_a_run_without_its_job_is_refused_with_the_form_that_is_wanted() -> None:
    with refuses(UsageError, "bad_name", "'gpt'", "JOB/RUN_ID", "default/gpt"):
        RunKey.parse("gpt")


@given(names, names)
def test_a_run_key_is_written_and_read_back(job: str, run_id: str) -> None:
    assert RunKey.parse(str(RunKey(job, run_id))) == RunKey(job, run_id)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-a", "a\n", "a" * 101, "ä", "a\0"])
def test_a_name_that_could_leave_its_directory_is_refused(name: str) -> None:
    with refuses(UsageError, "bad_name"):
        ids.check_name("run_id", name)


@given(st.lists(hashes, min_size=2, max_size=4, unique=True))
def test_a_snapshot_id_depends_on_each_digest_their_order_and_the_step(digests: list[str]) -> None:
    size = len(digests)
    first = ids.snapshot_id(key=SnapshotKey(1, 7), world_size=size, shard_digests=digests)
    assert first == ids.snapshot_id(key=SnapshotKey(1, 7), world_size=size, shard_digests=digests)
    assert first != ids.snapshot_id(key=SnapshotKey(2, 7), world_size=size, shard_digests=digests)
    assert first != ids.snapshot_id(key=SnapshotKey(1, 7), world_size=size, shard_digests=digests[::-1])
    with pytest.raises(UsageError):
        ids.snapshot_id(key=SnapshotKey(1, 7), world_size=size + 1, shard_digests=digests)


def test_descriptors_travel_with_their_frame_and_are_closed_when_it_is_bad(tmp_path: Path) -> None:
    file = tmp_path / "slot"
    file.write_bytes(b"bytes")
    sender, receiver = socket.socketpair()
    with sender, receiver, file.open("rb") as opened:
        message = messages.Reserved(slot_id="s", size_bytes=5)
        framing.send_frame(sender, message, message_id=4, fds=(opened.fileno(),))
        found, message_id, fds = framing.receive_frame(receiver)
        assert (found, message_id) == (message, 4)
        assert not os.get_inheritable(fds[0])
        with os.fdopen(fds[0], "rb") as received:
            assert received.read() == b"bytes"
        before = set(os.listdir("/proc/self/fd"))
        socket.send_fds(sender, [b"\0\0\0\2{}"], [opened.fileno()])
        with pytest.raises(IntegrityError):
            framing.receive_frame(receiver)
        assert set(os.listdir("/proc/self/fd")) == before


def test_a_frame_over_the_limit_is_refused_before_it_is_read() -> None:
    sender, receiver = socket.socketpair()
    with sender, receiver:
        sender.sendall((framing.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
        with refuses(IntegrityError, "bad_frame"):
            framing.receive_frame(receiver)


def test_a_peer_that_leaves_in_mid_frame_is_a_connection_error() -> None:
    sender, receiver = socket.socketpair()
    with receiver:
        with sender:
            sender.sendall(framing.encode_frame(messages.Done(), 1)[:-1])
        with pytest.raises(ConnectionError):
            framing.receive_frame(receiver)


def _reach(faults: str, *reaches: str) -> int:
    code = "from backstay import faults\n" + "\n".join(f"faults.reach({reach})" for reach in reaches)
    environment = dict(os.environ) | {"BACKSTAY_FAULTS": faults}
    return subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False).returncode


def test_a_fault_fires_at_its_logical_position_only() -> None:
    assert _reach("mid_copy,rank=3,step=12:kill", "'mid_copy', rank=3, step=11", "'after_slot', rank=3, step=12") == 0
    assert _reach("mid_copy,rank=3,step=12:kill", "'mid_copy', rank=3, step=12") == -signal.SIGKILL


def test_a_fault_fires_at_its_nth_reach_and_once_over_all_processes(tmp_path: Path) -> None:
    second = "mid_encode,nth=2:exit"
    assert _reach(second, "'mid_encode'") == 0
    assert _reach(second, "'mid_encode'", "'mid_encode'") == 1
    once = f"mid_encode,once={tmp_path}/fired:exit"
    assert _reach(once, "'mid_encode'") == 1
    assert _reach(once, "'mid_encode'") == 0
