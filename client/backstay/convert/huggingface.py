"""A model as Hugging Face keeps it: safetensors files of bounded size and, when there are several, an index.

Writes and reads files by path; standard library only.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from backstay.convert.atomic_files import appearing_whole, leaving_nothing
from backstay.convert.consolidate import WholeTensor
from backstay.errors import IntegrityError, UsageError
from backstay.format.shard import MAX_HEADER_BYTES

DEFAULT_FILE_BYTES: Final = 5_000_000_000
INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What an export came to."""

    files: tuple[Path, ...]
    tensor_count: int
    size_bytes: int


def write_model(tensors: Iterable[WholeTensor], directory: Path, *, file_bytes: int = DEFAULT_FILE_BYTES) -> Written:
    """Write ``tensors`` below ``directory``, which must not hold a model yet; each file appears whole, by rename.

    Raises:
        UsageError: the directory holds safetensors files. CapacityError: the disk is full; what was written is removed.
    """
    _check_empty(directory)
    groups = _divide(list(tensors), file_bytes)
    names = [SINGLE] if len(groups) == 1 else [_file_name(i, len(groups)) for i in range(len(groups))]
    total = sum(tensor.size_bytes for group in groups for tensor in group)
    with leaving_nothing("model", directory) as made:
        for name, group in zip(names, groups, strict=True):
            _write_file(directory / name, group)
            made.append(directory / name)
        if len(groups) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": {t.name: name for name, group in zip(names, groups, strict=True) for t in group},
            }
            with appearing_whole(directory / INDEX) as file:
                file.write(json.dumps(index, indent=2).encode())
            made.append(directory / INDEX)
    return Written(files=tuple(made), tensor_count=sum(map(len, groups)), size_bytes=total)


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundTensor:
    """One tensor of a safetensors file: bytes ``begin`` to ``end`` of ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int


def find_tensors(directory: Path) -> Iterator[FoundTensor]:
    """Every tensor of the model in ``directory``, by its index, or of all safetensors files there.

    Raises:
        UsageError: no safetensors file. IntegrityError: a file is damaged, or the index names what is not there.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = _read_index(index)
        for name in sorted(set(weight_map.values())):
            found = list(_read_header(_inside(directory, name, index)))
            yield from (tensor for tensor in found if weight_map.get(tensor.name) == name)
            missing = {t for t, f in weight_map.items() if f == name} - {tensor.name for tensor in found}
            if missing:
                raise IntegrityError(f"{directory / name} lacks {sorted(missing)[:5]}, which {INDEX} names")
        return
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{directory} holds no safetensors file; is it a Hugging Face model?", reason="no_model")
    for path in files:
        yield from _read_header(path)


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{index} is not an index of safetensors files: {error!r}", reason="bad_index") from error


def _inside(directory: Path, name: str, index: Path) -> Path:
    if "/" in name or "\0" in name or name in ("", ".", "..") or len(name) > 255:
        raise IntegrityError(f"{index} names a file outside its directory: {name!r}", reason="bad_index")
    return directory / name


def _read_header(path: Path) -> Iterator[FoundTensor]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header: dict[str, Any] = json.loads(file.read(length))
        for name, body in header.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + int(offset) for offset in body["data_offsets"])
            if not 8 + length <= begin <= end <= size:
                raise ValueError(f"{name} lies at bytes {begin} to {end} of {size}: the file is truncated")
            shape = tuple(int(n) for n in body["shape"])
            yield FoundTensor(name=name, dtype=str(body["dtype"]), shape=shape, path=path, begin=begin, end=end)
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing", reason="missing_file") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, struct.error) as error:
        raise IntegrityError(f"{path} is not a whole safetensors file: {error}", reason="bad_file") from error


def _check_empty(directory: Path) -> None:
    found = sorted(directory.glob("*.safetensors*")) if directory.is_dir() else []
    if found:
        raise UsageError(f"{directory} holds {found[0].name} already; choose an empty directory", reason="not_empty")


def _divide(tensors: Sequence[WholeTensor], file_bytes: int) -> list[list[WholeTensor]]:
    """Tensors in order, a new file when the next one would not fit; a tensor is never cut."""
    groups: list[list[WholeTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.size_bytes > file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.size_bytes
    return groups


def _file_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _write_file(path: Path, tensors: Sequence[WholeTensor]) -> None:
    # Larger elements first, so that every tensor is aligned to its own: safetensors forbids holes.
    ordered = sorted(tensors, key=lambda t: -_alignment(t))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size_bytes],
        }
        position += tensor.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with appearing_whole(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            file.write(tensor.read())


def _alignment(tensor: WholeTensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return tensor.size_bytes // count if count else 1
