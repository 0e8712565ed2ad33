"""Records from hostile JSON: whatever comes in, a record or an IntegrityError comes out."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backstay import ids
from backstay.errors import IntegrityError, UsageError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest, TensorEntry
from backstay.ids import RunKey
from backstay.protocol import framing, messages

values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
count = st.integers(0, 2**53)
entries = st.builds(
    TensorEntry,
    name=text,
    dtype=text,
    shape=st.lists(count, max_size=3).map(tuple),
    torch_dtype=text,
    offsets=st.lists(count, max_size=3).map(tuple),
    global_shape=st.lists(count, max_size=3).map(tuple),
    begin=count,
    end=count,
    crc=st.integers(0, 2**32 - 1),
)
manifests = st.builds(
    Manifest,
    run=text,
    attempt=count,
    step=count,
    rank=count,
    world_size=count,
    world_id=text,
    size_bytes=st.integers(-1, 4 * CHUNK_BYTES),
    header_bytes=st.integers(-1, CHUNK_BYTES),
    chunk_crcs=st.text("0123456789abcdefg", max_size=32),
    tensors=st.lists(entries, max_size=3).map(tuple),
    aliases=st.dictionaries(text, text, max_size=3),
)


@given(manifests)
def test_a_manifest_comes_back_from_its_bytes_with_the_same_digest(manifest: Manifest) -> None:
    found = json_records.loads(Manifest, json_records.dumps(manifest))
    assert (found, found.digest) == (manifest, manifest.digest)


@given(manifests)
def test_checking_any_manifest_passes_or_is_an_integrity_error(manifest: Manifest) -> None:
    try:
        manifest.check()
    except IntegrityError:
        return
    assert all(0 <= manifest.chunk_crc(index) < 2**32 for index in range(manifest.chunk_count))
    assert sum(manifest.chunk_length(index) for index in range(manifest.chunk_count)) == manifest.size_bytes


@given(st.sampled_from(sorted(messages.MESSAGES)), st.data())
def test_a_message_with_any_field_replaced_by_anything_is_a_message_or_refused(name: str, data: st.DataObject) -> None:
    cls = messages.MESSAGES[name]
    names = [field.name for field in dataclasses.fields(cls)]
    body = {field: data.draw(values) for field in names}
    payload = json.dumps({"type": name, "id": data.draw(st.integers(0, 9) | values), "body": body}).encode()
    try:
        message, message_id = framing.decode_payload(payload)
    except IntegrityError:
        return
    assert type(message) is cls
    assert type(message_id) is int


@given(values)
def test_no_json_value_makes_a_manifest_fail_in_another_way(value: Any) -> None:
    with pytest.raises(IntegrityError):
        json_records.from_json(Manifest, value)


@pytest.mark.parametrize(
    "payload",
    [b"[" * 100_000, b'{"a":' * 100_000, b"1e999", b"\xff\xfe", b"", b'"' + b"9" * 5000, b"9" * 5000],
)
def test_bytes_that_upset_a_json_parser_are_refused_calmly(payload: bytes) -> None:
    for attempt in (lambda: json_records.loads(Manifest, payload), lambda: framing.decode_payload(payload)):
        with pytest.raises(IntegrityError):
            attempt()


@pytest.mark.parametrize("value", ["ab", {"a": 1}, 5, None])
def test_a_tuple_is_a_list_on_the_wire_and_nothing_else(value: object) -> None:
    with pytest.raises(IntegrityError):
        json_records.from_json(messages.Reserve, {"step": 1, "size_bytes": 1, "known_slots": value})


@given(st.text(max_size=120))
def test_any_text_is_a_run_key_or_refused_and_never_leaves_its_directory(written: str) -> None:
    try:
        key = RunKey.parse(written)
    except UsageError:
        return
    assert str(key) == written
    for part in (key.job, key.run_id):
        assert part not in ("", ".", "..")
        assert not set(part) & set("/\0")


def test_incarnations_do_not_repeat() -> None:
    assert len({ids.new_incarnation() for _ in range(1000)}) == 1000


def test_a_manifest_may_have_the_longest_names_that_runs_and_worlds_may_have() -> None:
    run = str(RunKey("j" * 100, "r" * 100))
    manifest = Manifest(
        run=run, attempt=1, step=ids.MAX_COUNT - 1, rank=0, world_size=ids.MAX_WORLD_SIZE, world_id="w" * 100,
        size_bytes=4096, header_bytes=4096, chunk_crcs="0" * 8, tensors=(), layout="l" * 100,
    )  # fmt: skip
    manifest.check()
