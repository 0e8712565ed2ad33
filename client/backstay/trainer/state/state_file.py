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
from backstay.trainer.state import json_codec

_DOCUMENT: Final = "state.json"
_DIGESTS: Final = "backstay.digests"
_DIGESTS_CRC: Final = "backstay.digests.crc32c"
_PREFIX_BYTES: Final = 8


def write(file: IO[bytes], value: Any, *, name: str) -> None:
    """Write ``value``, called ``name`` in messages.

    Raises:
        UsageError: naming what would need pickle; nothing is written then.
    """
    living: dict[str, torch.Tensor] = {}
    document = _on_cpu(json_codec.encode(value, name, living))
    tensors = {f"tensor.{path}": raw_memory.as_plain(tensor, path) for path, tensor in living.items()}
    document_bytes = bytearray(json_codec.dumps(document))
    tensors[_DOCUMENT] = torch.frombuffer(document_bytes, dtype=torch.uint8)
    specs = [
        shard.TensorSpec(
            name=path, shape=tuple(t.shape), torch_dtype=str(t.dtype), offsets=(0,) * t.ndim, global_shape=tuple(t.shape)
        )
        for path, t in tensors.items()
    ]  # fmt: skip
    digests = json.dumps({path: [_crc(t), str(t.dtype), list(t.shape)] for path, t in tensors.items()})
    layout = shard.plan_layout(specs, metadata={_DIGESTS: digests, _DIGESTS_CRC: str(crc32c(digests.encode()))})
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
    document = b""
    for entry in layout.entries:
        crc, dtype, shape = digests[entry.name]
        tensor = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device="cpu")
        data = _read(file, raw_memory.byte_count(tensor), label)
        if crc32c(data) != crc:
            raise IntegrityError(
                f"{label}: the bytes of {entry.name} are not those that were written; nothing was loaded",
                reason="corrupt",
            )
        if entry.name == _DOCUMENT:
            document = data
            continue
        with raw_memory.lent(tensor) as view:
            view[:] = data
        tensors[entry.name.removeprefix("tensor.")] = tensor
    return json_codec.decode(json_codec.loads(document), tensors)


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


def _on_cpu(document: Any) -> Any:
    """The document with all its tensors said to be on the CPU: another machine may lack the device they were on."""
    if isinstance(document, list):
        return [_on_cpu(item) for item in document]
    if not isinstance(document, dict):
        return document
    if "$tensor" in document:
        return {**document, "device": "cpu"}
    return {key: _on_cpu(item) for key, item in document.items()}
