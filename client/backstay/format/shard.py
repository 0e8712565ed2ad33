"""The shard file: a safetensors file whose bytes lie where a capture can write and a reader can map them.

Plans the layout of a rank's tensors, writes and reads the header, and checks a file against its manifest. Knows tensors by
name, dtype and shape only: standard library alone, no torch.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from backstay.errors import IntegrityError, UsageError
from backstay.format.manifest import Manifest, TensorEntry, UnchangedRange

PAGE_BYTES: Final = 4096  # header_bytes is a multiple: tensor data starts on a page
ALIGNMENT_BYTES: Final = 64
MAX_HEADER_BYTES: Final = 100_000_000  # safetensors refuses a longer one
HEADER_FORMAT: Final = "1"

_METADATA: Final = "__metadata__"
_SHARDING_KEY: Final = "DCP_SHARDING_INFO"
_FORMAT_KEY: Final = "backstay.format"
_DTYPES_KEY: Final = "backstay.dtypes"
IMPORTED_KEY: Final = "backstay.imported"  # in the header of a shard that no trainer of ours wrote
_SHAPES_KEY: Final = "backstay.global_shapes"
_ALIASES_KEY: Final = "backstay.aliases"
_RESERVED: Final = frozenset(
    {_SHARDING_KEY, "DCP_VERSION", "format", _FORMAT_KEY, _DTYPES_KEY, _SHAPES_KEY, _ALIASES_KEY}
)


@dataclass(frozen=True, slots=True)
class StorageRule:
    """How a torch dtype lies in the file: safetensors ``dtype``, with ``trailing`` dimensions after the tensor's own.

    ``item_bytes`` is the size of one element of the torch dtype.
    """

    dtype: str
    item_bytes: int
    trailing: tuple[int, ...] = ()


_STORED_BYTES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip

# The dtypes DCP's safetensors reader knows keep their names: it then copies bits. (A same-bytes U8 would be read into a
# float8 tensor as numbers, silently.) One dtype it does not know would make it refuse the whole directory.
_NATIVE: Final = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32", "int32": "I32",
    "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64",
    "complex64": "C64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_ONE_BYTE: Final = (
    "float8_e8m0fnu", "float4_e2m1fn_x2", "bits8", "bits1x8", "bits2x4", "bits4x2",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
)  # fmt: skip

STORAGE_RULES: Final[dict[str, StorageRule]] = {
    **{f"torch.{name}": StorageRule(dtype, _STORED_BYTES[dtype]) for name, dtype in _NATIVE.items()},
    **{f"torch.{name}": StorageRule("U8", 1) for name in _ONE_BYTE},
    "torch.bits16": StorageRule("I16", 2),
    "torch.complex32": StorageRule("F16", 4, (2,)),
    "torch.complex128": StorageRule("F64", 16, (2,)),
}
"""By ``str(tensor.dtype)``. Quantized dtypes have no rule: their scale and zero point are not in their bytes."""

_TORCH_DTYPES: Final = {dtype: f"torch.{name}" for name, dtype in _NATIVE.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One local chunk to store: ``shape`` elements at ``offsets`` of a tensor of ``global_shape``.

    ``torch_dtype`` is ``str(tensor.dtype)``, such as ``"torch.bfloat16"``. ``is_frozen``: laid beside others that do not
    change, so that few chunks hold both.
    """

    name: str
    torch_dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]
    is_frozen: bool = False

    @classmethod
    def whole(cls, name: str, torch_dtype: str, shape: Iterable[int]) -> TensorSpec:
        """A tensor that is stored whole."""
        shape = tuple(shape)
        return cls(name, torch_dtype, shape, (0,) * len(shape), shape)

    @property
    def is_empty_chunk(self) -> bool:
        """Whether this rank holds nothing of a tensor that is not empty itself."""
        return math.prod(self.shape) == 0 and math.prod(self.global_shape) != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where each byte of a shard file lies.

    Invariant: ``header`` is bytes 0 to ``header_bytes`` of the file, ``entries`` cover the rest up to ``size_bytes`` in order,
    without hole or overlap, each aligned to its item size (and to 64 bytes where its size is a multiple of 64).
    ``entries`` have no crc yet; their ``dtype`` and ``shape`` are as stored, their ``offsets`` and
    ``global_shape`` the tensor's own.
    """

    header: bytes
    header_bytes: int
    size_bytes: int
    entries: tuple[TensorEntry, ...]
    aliases: dict[str, str]
    metadata: dict[str, str] = field(default_factory=dict)  # the caller's own keys
    _by_name: dict[str, TensorEntry] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._by_name.update((entry.name, entry) for entry in self.entries)

    def entry(self, name: str) -> TensorEntry:
        """The entry of ``name``, or of the target of an alias; raises UsageError if there is none."""
        try:
            return self._by_name[self.aliases.get(name, name)]
        except KeyError:
            raise UsageError(f"the shard layout has no tensor {name!r} among its {len(self.entries)}") from None


def plan_layout(
    specs: Iterable[TensorSpec], *, metadata: Mapping[str, str] | None = None, aliases: Mapping[str, str] | None = None
) -> Layout:
    """Lay out one rank's tensors; a function of the set of specs, not of their order.

    Safetensors forbids holes, so tensors whose size is a multiple of 64 come first (of these the frozen
    ones), then the others by descending item size.
    Chunks that are empty while their tensor is not are left out (and aliases to them); zero-size tensors are stored.

    Raises:
        UsageError: for a dtype without storage rule, a name used twice or a chunk outside its tensor, naming the tensor.
    """
    stored = [spec for spec in specs if _is_stored(spec)]
    names = {spec.name for spec in stored}
    if len(names) != len(stored):
        twice = sorted(spec.name for spec in stored)
        name = next(a for a, b in itertools.pairwise(twice) if a == b)
        raise UsageError(
            f"tensor {name!r} is given twice; each name is stored once per shard", reason="duplicate_tensor"
        )
    kept_aliases = {alias: target for alias, target in sorted((aliases or {}).items()) if target in names}
    clash = names.intersection(kept_aliases)
    if clash:
        raise UsageError(f"{min(clash)!r} is both a stored tensor and an alias", reason="duplicate_tensor")
    ordered = sorted(stored, key=_placement)
    header = _encode_header(ordered, metadata or {}, kept_aliases)
    entries, end = _place(ordered, len(header))
    return Layout(
        header=header,
        header_bytes=len(header),
        size_bytes=end,
        entries=entries,
        aliases=kept_aliases,
        metadata=dict(metadata or {}),
    )


def build_manifest(
    layout: Layout,
    *,
    run: str,
    attempt: int,
    step: int,
    rank: int,
    world_size: int,
    world_id: str,
    chunk_crcs: str,
    tensor_crcs: Mapping[str, int],
    unchanged: tuple[UnchangedRange, ...] = (),
    model_signature: str = "",
    layout_signature: str = "",
    writer: str = "",
) -> Manifest:
    """The commit record of a shard written in ``layout``; the digests are those of :class:`backstay.format.digest.Digester`."""
    tensors = tuple(
        TensorEntry(
            name=e.name, dtype=e.dtype, shape=e.shape, torch_dtype=e.torch_dtype, offsets=e.offsets,
            global_shape=e.global_shape, begin=e.begin, end=e.end, crc=tensor_crcs[e.name],
        )
        for e in layout.entries
    )  # fmt: skip
    manifest = Manifest(
        run=run,
        attempt=attempt,
        step=step,
        rank=rank,
        world_size=world_size,
        world_id=world_id,
        size_bytes=layout.size_bytes,
        header_bytes=layout.header_bytes,
        chunk_crcs=chunk_crcs,
        tensors=tensors,
        aliases=dict(layout.aliases),
        unchanged=unchanged,
        model_signature=model_signature,
        layout=layout_signature,
        writer=writer,
    )
    manifest.check()
    return manifest


def parse_header(view: bytes | bytearray | memoryview, *, size_bytes: int | None = None) -> Layout:
    """Read the layout back from the start of a shard file.

    Args:
        view: The file, or a part of it from byte 0 that holds at least the header.
        size_bytes: Size of the whole file; by default that of ``view``.

    Raises:
        IntegrityError: for anything that is not a whole shard file of a format this version reads.
    """
    view = memoryview(view)
    total = view.nbytes if size_bytes is None else size_bytes
    header_bytes = _header_length(view, total)
    tensors, metadata = _load_header(bytes(view[8:header_bytes]))
    if metadata.get(_FORMAT_KEY) != HEADER_FORMAT:
        raise IntegrityError(
            f"a safetensors file but not a backstay shard of format {HEADER_FORMAT} "
            f"({_FORMAT_KEY} is {metadata.get(_FORMAT_KEY)!r}); not used",
            reason="foreign_file",
        )
    try:
        entries = _read_entries(tensors, metadata, header_bytes)
        aliases = _string_map(json.loads(metadata.get(_ALIASES_KEY, "{}")))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise IntegrityError(f"shard header is malformed: {error}; not used", reason="bad_header") from error
    _check_coverage(entries, header_bytes, total)
    return Layout(
        header=bytes(view[:header_bytes]),
        header_bytes=header_bytes,
        size_bytes=total,
        entries=entries,
        aliases=aliases,
        metadata={key: value for key, value in metadata.items() if key not in _RESERVED},
    )


def check_file(fd: int, manifest: Manifest) -> None:
    """Check size, allocated blocks and header of an open shard file against its manifest; reads the header only.

    Raises:
        IntegrityError: with a reason of ``not_a_file``, ``truncated``, ``holes``, ``header_mismatch`` or as
            :func:`parse_header`.
    """
    manifest.check()
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise IntegrityError("the descriptor of a shard is not a regular file; not used", reason="not_a_file")
    if status.st_size != manifest.size_bytes:
        raise IntegrityError(
            f"{shard_label(manifest)} has {status.st_size} bytes, its manifest says {manifest.size_bytes}; not used",
            reason="truncated",
        )
    if status.st_blocks * 512 < status.st_size:
        raise IntegrityError(
            f"{shard_label(manifest)} has holes: {status.st_blocks * 512} of {status.st_size} bytes are allocated; not used",
            reason="holes",
        )
    layout = parse_header(read_range(fd, 0, manifest.header_bytes), size_bytes=status.st_size)
    _check_same_tensors(layout, manifest)


def read_range(fd: int, begin: int, end: int) -> bytes:
    """Bytes ``begin`` to ``end`` of an open file, by ``pread``; raises IntegrityError if the file ends before."""
    parts = []
    while begin < end:
        part = os.pread(fd, end - begin, begin)
        if not part:
            raise IntegrityError(f"shard file ends at byte {begin}, {end - begin} short; not used", reason="truncated")
        parts.append(part)
        begin += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def shard_label(manifest: Manifest) -> str:
    """How messages name a shard."""
    return f"shard of rank {manifest.rank} at step {manifest.step} (attempt {manifest.attempt}) of {manifest.run}"


def _is_stored(spec: TensorSpec) -> bool:
    if spec.torch_dtype not in STORAGE_RULES:
        raise UsageError(
            f"tensor {spec.name!r} is of dtype {spec.torch_dtype}, which has no storage rule; "
            "leave it out of the state or convert it (a quantized tensor: store int_repr(), scale and zero point)",
            reason="unsupported_dtype",
        )
    try:
        spec.name.encode()
    except UnicodeEncodeError:
        raise UsageError(f"tensor name {spec.name!r} cannot be written as UTF-8", reason="bad_tensor") from None
    if not spec.name or spec.name == _METADATA:
        raise UsageError(f"{spec.name!r} cannot be the name of a tensor", reason="bad_tensor")
    boxes = (spec.shape, spec.offsets, spec.global_shape)
    is_inside = len({len(box) for box in boxes}) == 1 and all(
        size >= 0 and offset >= 0 and offset + size <= whole for size, offset, whole in zip(*boxes, strict=True)
    )
    if not is_inside:
        raise UsageError(
            f"chunk of tensor {spec.name!r} lies outside it: shape {spec.shape} at {spec.offsets} of {spec.global_shape}",
            reason="bad_tensor",
        )
    return not spec.is_empty_chunk


def _spec_bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * STORAGE_RULES[spec.torch_dtype].item_bytes


def _placement(spec: TensorSpec) -> tuple[int, int, bool, str]:
    is_odd = _spec_bytes(spec) % ALIGNMENT_BYTES != 0
    item_bytes = STORAGE_RULES[spec.torch_dtype].item_bytes
    return (1, -item_bytes, spec.is_frozen, spec.name) if is_odd else (0, 0, not spec.is_frozen, spec.name)


def _place(specs: Iterable[TensorSpec], begin: int) -> tuple[tuple[TensorEntry, ...], int]:
    entries = []
    for spec in specs:
        rule = STORAGE_RULES[spec.torch_dtype]
        end = begin + _spec_bytes(spec)
        entries.append(
            TensorEntry(
                name=spec.name, dtype=rule.dtype, shape=(*spec.shape, *rule.trailing), torch_dtype=spec.torch_dtype,
                offsets=spec.offsets, global_shape=spec.global_shape, begin=begin, end=end,
            )
        )  # fmt: skip
        begin = end
    return tuple(entries), begin


def _encode_header(specs: list[TensorSpec], metadata: Mapping[str, str], aliases: Mapping[str, str]) -> bytes:
    """Length, JSON and blanks up to a multiple of 4096 bytes."""
    clash = _RESERVED.intersection(metadata)
    if clash:
        raise UsageError(f"metadata key {min(clash)!r} is reserved", reason="bad_metadata")
    offsets = {
        s.name: {"saved_offsets": [*s.offsets, *(0 for _ in STORAGE_RULES[s.torch_dtype].trailing)]} for s in specs
    }
    dtypes = {
        s.name: s.torch_dtype for s in specs if _TORCH_DTYPES.get(STORAGE_RULES[s.torch_dtype].dtype) != s.torch_dtype
    }
    shapes = {s.name: list(s.global_shape) for s in specs if s.global_shape != s.shape}
    own = {
        "format": "pt",
        "DCP_VERSION": "1.0",
        _SHARDING_KEY: _compact(offsets),
        _FORMAT_KEY: HEADER_FORMAT,
        _DTYPES_KEY: _compact(dtypes),
        _SHAPES_KEY: _compact(shapes),
        _ALIASES_KEY: _compact(dict(aliases)),
    }
    document: dict[str, Any] = {_METADATA: {**dict(sorted(metadata.items())), **own}}
    entries, _ = _place(specs, 0)
    for entry in entries:
        document[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [entry.begin, entry.end]}
    text = _compact(document).encode()
    padded = text.ljust(-(-(len(text) + 8) // PAGE_BYTES) * PAGE_BYTES - 8)
    if len(padded) > MAX_HEADER_BYTES:
        raise UsageError(f"shard header of {len(padded)} bytes is over safetensors' limit of {MAX_HEADER_BYTES}")
    return struct.pack("<Q", len(padded)) + padded


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _header_length(view: memoryview, total: int) -> int:
    if view.nbytes < 8 or total < 8:
        raise IntegrityError(f"a file of {total} bytes is too short for a shard header; not used", reason="truncated")
    (length,) = struct.unpack("<Q", view[:8])
    if length > MAX_HEADER_BYTES or (length + 8) % PAGE_BYTES:
        raise IntegrityError(
            f"not a shard file: its first 8 bytes give a header of {length} bytes; not used", reason="foreign_file"
        )
    header_bytes = int(length) + 8
    if header_bytes > min(total, view.nbytes):
        raise IntegrityError(
            f"shard file is truncated: header of {header_bytes} bytes, {min(total, view.nbytes)} are there; not used",
            reason="truncated",
        )
    return header_bytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is there twice")
    return result


def _load_header(text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        document = json.loads(text, object_pairs_hook=_unique)
        metadata = _string_map(document.pop(_METADATA, {}))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"shard header is not safetensors JSON: {error}; not used", reason="bad_header") from error
    return document, metadata


def _string_map(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise TypeError("expected an object of strings")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
        raise TypeError(f"expected a list of sizes, found {value!r:.80}")
    return tuple(value)


def _read_entries(tensors: dict[str, Any], metadata: dict[str, str], header_bytes: int) -> tuple[TensorEntry, ...]:
    dtypes = _string_map(json.loads(metadata[_DTYPES_KEY]))
    shapes = json.loads(metadata[_SHAPES_KEY])
    sharding = json.loads(metadata[_SHARDING_KEY])
    entries = []
    for name, body in tensors.items():
        stored = body["dtype"]
        torch_dtype = dtypes[name] if name in dtypes else _TORCH_DTYPES[stored]
        rule = STORAGE_RULES[torch_dtype]
        shape, (begin, end) = _sizes(body["shape"]), _sizes(body["data_offsets"])
        own = len(shape) - len(rule.trailing)
        if (
            rule.dtype != stored
            or shape[own:] != rule.trailing
            or end - begin != math.prod(shape) * _STORED_BYTES[stored]
        ):
            raise ValueError(f"tensor {name!r}: {end - begin} bytes of {stored} {shape} do not make a {torch_dtype}")
        entries.append(
            TensorEntry(
                name=name, dtype=stored, shape=shape, torch_dtype=torch_dtype,
                offsets=_sizes(sharding[name]["saved_offsets"])[:own],
                global_shape=_sizes(shapes[name]) if name in shapes else shape[:own],
                begin=header_bytes + begin, end=header_bytes + end,
            )
        )  # fmt: skip
    return tuple(sorted(entries, key=lambda entry: (entry.begin, entry.end)))


def _check_coverage(entries: tuple[TensorEntry, ...], header_bytes: int, total: int) -> None:
    position = header_bytes
    for entry in entries:
        if entry.begin != position:
            raise IntegrityError(
                f"shard header leaves a hole or overlap before {entry.name!r}; not used", reason="bad_header"
            )
        position = entry.end
    if position != total:
        raise IntegrityError(
            f"shard file has {total} bytes, its header describes {position}; not used", reason="truncated"
        )


def _check_same_tensors(layout: Layout, manifest: Manifest) -> None:
    in_file = {entry.name: _place_of(entry) for entry in layout.entries}
    in_manifest = {entry.name: _place_of(entry) for entry in manifest.tensors}
    if layout.header_bytes == manifest.header_bytes and in_file == in_manifest and layout.aliases == manifest.aliases:
        return
    differing = sorted(
        name for name in in_file.keys() | in_manifest.keys() if in_file.get(name) != in_manifest.get(name)
    )
    what = f"tensor {differing[0]!r}" if differing else "the header's length or its aliases"
    raise IntegrityError(
        f"{shard_label(manifest)}: file and manifest disagree about {what} ({len(differing)} tensors in all); not used",
        reason="header_mismatch",
    )


def _place_of(entry: TensorEntry) -> tuple[object, ...]:
    return (entry.dtype, entry.shape, entry.torch_dtype, entry.offsets, entry.global_shape, entry.begin, entry.end)
