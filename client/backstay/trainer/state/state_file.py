"""One nested state (dicts, lists, numbers, tensors) as one safetensors file, without pickle, verified when it is read.

What cannot be stored is refused with the path to it. Must not know what the state is of, nor where the file lies.
"""

from __future__ import annotations

import json
from typing import IO, Any, Final

import torch
from crc32c import crc32c

from backstay.errors import IntegrityError
from backstay.format import shard
from backstay.trainer import raw_memory
from backstay.trainer.state import packing

_DIGESTS: Final = "backstay.digests"
_DIGESTS_CRC: Final = "backstay.digests.crc32c"
_PREFIX_BYTES: Final = 8


def write(file: IO[bytes], value: Any, *, name: str) -> None:
    """Write ``value``, called ``name`` in messages.

    Raises:
        UsageError: naming what would need pickle; nothing is written then.
    """
    packed = packing.pack(value, lambda _: None, name=name)
    tensors = {path: tensor.cpu().resolve_conj().resolve_neg().contiguous() for path, tensor in packed.tensors.items()}
    digests = json.dumps({path: [_crc(t), str(t.dtype), list(t.shape)] for path, t in tensors.items()})
    layout = packed.layout({_DIGESTS: digests, _DIGESTS_CRC: str(crc32c(digests.encode()))})
    file.write(layout.header)
    for entry in layout.entries:
        with raw_memory.lent(tensors[entry.name]) as view:
            file.write(view)


def read(file: IO[bytes], *, size_bytes: int, label: str) -> Any:
    """What :func:`write` was given; tensors are on the CPU.

    Raises:
        IntegrityError: if it is another file, or a byte of it is wrong.
    """
    prefix = _read(file, _PREFIX_BYTES, label)
    length = int.from_bytes(prefix, "little")
    if length + _PREFIX_BYTES > size_bytes:
        raise IntegrityError(f"{label} is no checkpoint of backstay; nothing was loaded", reason="foreign_file")
    layout = shard.parse_header(prefix + _read(file, length, label), size_bytes=size_bytes)
    text = layout.metadata.get(_DIGESTS, "")
    if not text or str(crc32c(text.encode())) != layout.metadata.get(_DIGESTS_CRC):
        raise IntegrityError(f"{label}: its digests are missing or changed; nothing was loaded", reason="corrupt")
    digests = json.loads(text)
    tensors: dict[str, torch.Tensor] = {}
    for entry in layout.entries:
        crc, dtype, shape = digests[entry.name]
        tensor = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="cpu")
        data = _read(file, raw_memory.byte_count(tensor), label)
        if crc32c(data) != crc:
            raise IntegrityError(
                f"{label}: the bytes of {entry.name} are not those that were written; nothing was loaded",
                reason="corrupt",
            )
        with raw_memory.lent(tensor) as view:
            view[:] = data
        tensors[entry.name] = tensor
    return packing.unpack(tensors, lambda _kind, body: body, device="cpu")


def _read(file: IO[bytes], count: int, label: str) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise IntegrityError(
            f"{label} ends {count - len(data)} bytes too early; nothing was loaded", reason="truncated"
        )
    return data


def _crc(tensor: torch.Tensor) -> int:
    with raw_memory.lent(tensor) as view:
        return int(crc32c(view))
