"""The shard file's layout: no hole, no overlap, aligned, the same for the same tensors; and nothing malformed gets through."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backstay.errors import BackstayError, IntegrityError, UsageError
from backstay.format.digest import Digester
from backstay.format.manifest import Manifest
from backstay.format.shard import (
    PAGE_BYTES,
    STORAGE_RULES,
    Layout,
    TensorSpec,
    build_manifest,
    check_file,
    parse_header,
    plan_layout,
    read_range,
)
from tests.kit.wording import refuses

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def spec_lists(draw: st.DrawFn) -> list[TensorSpec]:
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__")
    names = draw(st.lists(text, max_size=12, unique=True))
    specs = []
    for name in names:
        shape = draw(shapes)
        offsets = tuple(draw(st.integers(0, 5)) for _ in shape)
        whole = tuple(size + offset + draw(st.integers(0, 5)) for size, offset in zip(shape, offsets, strict=True))
        specs.append(TensorSpec(name, draw(st.sampled_from(sorted(STORAGE_RULES))), shape, offsets, whole))
    return specs


def fill(layout: Layout) -> bytes:
    body = bytes(index * 7 & 255 for index in range(layout.size_bytes - layout.header_bytes))
    return layout.header + body


def a_manifest(layout: Layout, data: bytes) -> Manifest:
    digester = Digester(layout)
    digester.update_span(data)
    chunk_crcs, tensor_crcs = digester.finish()
    return build_manifest(
        layout,
        run="default/gpt",
        attempt=1,
        step=7,
        rank=0,
        world_size=1,
        world_id="w",
        chunk_crcs=chunk_crcs,
        tensor_crcs=tensor_crcs,
    )


@given(spec_lists(), st.randoms(use_true_random=False))
def test_tensors_cover_the_file_without_hole_or_overlap_aligned_whatever_their_order(specs, random) -> None:  # type: ignore[no-untyped-def]
    layout = plan_layout(specs)
    assert layout.header_bytes == len(layout.header)
    assert layout.header_bytes % PAGE_BYTES == 0
    position = layout.header_bytes
    for entry in layout.entries:
        item_bytes = STORAGE_RULES[entry.torch_dtype].item_bytes
        size = entry.end - entry.begin
        assert entry.begin == position
        assert entry.begin % item_bytes == 0
        assert size % 64 != 0 or entry.begin % 64 == 0
        position = entry.end
    assert position == layout.size_bytes
    shuffled = list(specs)
    random.shuffle(shuffled)
    assert plan_layout(shuffled) == layout


@given(spec_lists())
def test_each_tensor_is_stored_once_with_all_its_bytes_and_only_empty_chunks_are_left_out(
    specs: list[TensorSpec],
) -> None:
    layout = plan_layout(specs)
    expected = {
        spec.name: math.prod(spec.shape) * STORAGE_RULES[spec.torch_dtype].item_bytes
        for spec in specs
        if math.prod(spec.shape) or not math.prod(spec.global_shape)
    }
    assert {entry.name: entry.end - entry.begin for entry in layout.entries} == expected


@given(spec_lists())
def test_a_header_says_all_that_the_layout_does(specs: list[TensorSpec]) -> None:
    aliases = {"tied\u00e9": specs[0].name, "lost": "nowhere"} if specs else {}
    layout = plan_layout(
        specs, metadata={"mine": "1"}, aliases={a: t for a, t in aliases.items() if a != specs[0].name}
    )
    assert parse_header(fill(layout)) == layout
    assert parse_header(layout.header, size_bytes=layout.size_bytes) == layout


@given(spec_lists(), st.data())
@settings(max_examples=200)
def test_a_damaged_file_raises_integrity_errors_and_nothing_else(specs: list[TensorSpec], data: st.DataObject) -> None:
    content = bytearray(fill(plan_layout(specs)))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, min(len(content), 700) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    try:
        parse_header(content)
    except IntegrityError as error:
        assert "not used" in str(error)  # noqa: PT017 - many flips are harmless (a blank for a blank), none may crash


@pytest.mark.parametrize("junk", [b"", b"\0" * 7, b"\x7fELF" * 3000, b"[" * 9000, b"\0" * 8192])
def test_foreign_bytes_are_refused(junk: bytes) -> None:
    with pytest.raises(IntegrityError):
        parse_header(junk)


def with_header(document: object, body: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    padded = text.ljust(-(-(len(text) + 8) // PAGE_BYTES) * PAGE_BYTES - 8)
    return struct.pack("<Q", len(padded)) + padded + body


@pytest.mark.parametrize("text", [b"[]", b"7", b"[" * 100_000, b'{"a":1,"a":2}', b"\xff", b'{"__metadata__":{"a":1}}'])
def test_a_header_that_is_no_safetensors_json_is_refused(text: bytes) -> None:
    with refuses(IntegrityError, "bad_header"):
        parse_header(with_header(text))


def test_a_foreign_safetensors_file_is_refused_by_name() -> None:
    body = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    with refuses(IntegrityError, "foreign_file") as caught:
        parse_header(with_header(body, b"1234"))
    assert caught.value.reason == "foreign_file"


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F9"},
        {"dtype": None},
        {"shape": [5]},
        {"shape": [-4]},
        {"shape": "4"},
        {"data_offsets": [0]},
        {"data_offsets": [4, 8]},
        {"data_offsets": [0, 10**30]},
        {"data_offsets": [True, 4]},
    ],
)
def test_a_tensor_whose_bytes_do_not_make_its_shape_is_refused(change: dict[str, object]) -> None:
    layout = plan_layout([TensorSpec.whole("a", "torch.uint8", (4,))])
    document = json.loads(layout.header[8:])
    document["a"].update(change)
    with pytest.raises(IntegrityError):
        parse_header(with_header(document, b"1234"))


@pytest.mark.parametrize("dtype", ["torch.qint8", "torch.quint8", "torch.qint32", "torch.float1", "F32", ""])
def test_a_dtype_without_rule_is_refused_and_the_tensor_named(dtype: str) -> None:
    with pytest.raises(UsageError, match=r"'model\.layer\.odd'") as caught:
        plan_layout([TensorSpec.whole("model.layer.odd", dtype, (2,))])
    assert caught.value.reason == "unsupported_dtype"


@pytest.mark.parametrize(
    "specs",
    [
        [TensorSpec.whole("a", "torch.int8", (1,)), TensorSpec.whole("a", "torch.int8", (2,))],
        [TensorSpec.whole("", "torch.int8", (1,))],
        [TensorSpec.whole("__metadata__", "torch.int8", (1,))],
        [TensorSpec.whole("\ud800", "torch.int8", (1,))],
        [TensorSpec("a", "torch.int8", (2,), (3,), (4,))],
        [TensorSpec("a", "torch.int8", (2,), (), (4,))],
        [TensorSpec("a", "torch.int8", (2,), (-1,), (4,))],
    ],
)
def test_specs_that_make_no_sense_are_refused(specs: list[TensorSpec]) -> None:
    with pytest.raises(UsageError):
        plan_layout(specs)


def test_a_name_cannot_be_tensor_and_alias_and_metadata_cannot_pose_as_ours() -> None:
    specs = [TensorSpec.whole("a", "torch.int8", (1,)), TensorSpec.whole("b", "torch.int8", (1,))]
    with refuses(UsageError, "duplicate_tensor"):
        plan_layout(specs, aliases={"a": "b"})
    with pytest.raises(UsageError, match="reserved"):
        plan_layout(specs, metadata={"DCP_SHARDING_INFO": "{}"})


def test_an_alias_finds_the_stored_tensor() -> None:
    layout = plan_layout([TensorSpec.whole("embed", "torch.float32", (4,))], aliases={"head": "embed"})
    assert layout.entry("head") is layout.entry("embed")
    with pytest.raises(UsageError, match="'tail'"):
        layout.entry("tail")


class TestFile:
    """check_file on real files."""

    @pytest.fixture
    def shard(self, tmpfs_dir: Path) -> tuple[Path, Manifest]:
        specs = [TensorSpec.whole("w", "torch.float32", (100, 100)), TensorSpec.whole("step", "torch.int64", ())]
        layout = plan_layout(specs)
        path = tmpfs_dir / "shard"
        path.write_bytes(fill(layout))
        return path, a_manifest(layout, path.read_bytes())

    def check(self, path: Path, manifest: Manifest) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            check_file(fd, manifest)
        finally:
            os.close(fd)

    def test_a_whole_file_passes(self, shard: tuple[Path, Manifest]) -> None:
        self.check(*shard)

    @pytest.mark.parametrize(
        "bad", ["0000000G", "ABCDEF01", "0 0 0 0 ", "0000 000", "0x000000", "\u0660" * 8, "0000000\n"]
    )
    def test_digests_that_are_not_lower_case_hexadecimal_are_refused(
        self, shard: tuple[Path, Manifest], bad: str
    ) -> None:
        path, manifest = shard
        with refuses(IntegrityError, "bad_manifest"):
            self.check(path, replace(manifest, chunk_crcs=bad + manifest.chunk_crcs[8:]))

    def test_a_truncated_file_is_refused_with_both_sizes(self, shard: tuple[Path, Manifest]) -> None:
        path, manifest = shard
        os.truncate(path, manifest.size_bytes - 1)
        with pytest.raises(IntegrityError, match=f"{manifest.size_bytes - 1} bytes.*{manifest.size_bytes}") as caught:
            self.check(path, manifest)
        assert caught.value.reason == "truncated"

    def test_a_file_with_holes_is_refused(self, shard: tuple[Path, Manifest]) -> None:
        path, manifest = shard
        os.truncate(path, manifest.header_bytes)
        os.truncate(path, manifest.size_bytes)
        with pytest.raises(IntegrityError) as caught:
            self.check(path, manifest)
        assert caught.value.reason == "holes"

    def test_a_header_of_another_layout_is_refused(self, shard: tuple[Path, Manifest]) -> None:
        path, manifest = shard
        first, second = manifest.tensors
        other = replace(manifest, tensors=(first, replace(second, torch_dtype="torch.uint64", dtype="U64")))
        with pytest.raises(IntegrityError, match=f"{second.name!r}") as caught:
            self.check(path, other)
        assert caught.value.reason == "header_mismatch"
        with pytest.raises(IntegrityError, match="disagree"):
            self.check(path, replace(manifest, aliases={"a": "w"}))

    def test_a_flipped_byte_in_the_header_is_seen_or_harmless(self, shard: tuple[Path, Manifest]) -> None:
        path, manifest = shard
        whole = path.read_bytes()
        length = len(whole[: manifest.header_bytes].rstrip())
        for position in range(0, length, 3):
            changed = bytearray(whole)
            changed[position] ^= 1
            path.write_bytes(changed)
            try:
                self.check(path, manifest)
            except BackstayError as error:
                assert isinstance(error, IntegrityError)  # noqa: PT017
            else:
                assert b"__metadata__" in whole[8:40], (
                    "only our metadata may change unseen here; its chunk's crc sees it"
                )
                assert position < whole.index(b"}", whole.index(b"backstay.aliases"))

    def test_what_is_no_file_is_refused(self, shard: tuple[Path, Manifest]) -> None:
        fd, other = os.pipe()
        try:
            with pytest.raises(IntegrityError) as caught:
                check_file(fd, shard[1])
        finally:
            os.close(fd)
            os.close(other)
        assert caught.value.reason == "not_a_file"

    def test_a_range_past_the_end_is_an_error_not_a_short_read(self, shard: tuple[Path, Manifest]) -> None:
        path, manifest = shard
        with path.open("rb") as file:
            assert read_range(file.fileno(), 0, 8) == path.read_bytes()[:8]
            with pytest.raises(IntegrityError, match="2 short"):
                read_range(file.fileno(), manifest.size_bytes - 3, manifest.size_bytes + 2)
