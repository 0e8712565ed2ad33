"""Checkpoints of others as whole tensors under the names that shards use: Hugging Face, DCP, DeepSpeed universal.

Nothing is unpickled: DCP's ``.metadata`` is read by an unpickler that knows only its own record classes, tensors by
``torch.load(weights_only=True)``. Only tensors are taken over.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch

from backstay.convert import huggingface
from backstay.convert.snapshot_writer import Source
from backstay.errors import IntegrityError, UsageError
from backstay.format.shard import STORAGE_RULES
from backstay.ids import MAX_COUNT
from backstay.trainer import raw_memory

_SAFETENSORS: Final = {
    rule.dtype: name for name, rule in reversed(STORAGE_RULES.items()) if not rule.trailing and rule.dtype != "U8"
} | {"U8": "torch.uint8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a checkpoint holds. ``states``: parameter to its optimizer tensors (key, torch dtype, is it shaped like it)."""

    sources: tuple[Source, ...]
    states: Mapping[str, tuple[tuple[str, str, bool], ...]] = field(default_factory=dict)
    step: int | None = None
    left_out: tuple[str, ...] = ()


def detect(directory: Path) -> str:
    """Which format ``directory`` is in; raises UsageError when none fits."""
    if (directory / ".metadata").is_file():
        return "dcp"
    if (directory / "zero").is_dir():
        return "universal"
    if any(directory.glob("*.safetensors")):
        return "huggingface"
    raise UsageError(
        f"{directory} is no checkpoint known here: it has neither .metadata (DCP) nor zero/ (DeepSpeed universal) nor "
        "*.safetensors (Hugging Face)",
        reason="unknown_format",
    )


def read_checkpoint(
    directory: Path, kind: str, *, dtype: torch.dtype | None = None, prefix: str | None = None
) -> Found:
    """Everything in ``directory`` that can be taken over; nothing of it is read into memory yet.

    Args:
        dtype: What parameters of the model are converted to; None leaves them as they are.
        prefix: What the names of the model's tensors begin with in a DCP checkpoint; None finds out.
    """
    if kind == "huggingface":
        found = _huggingface(directory)
    elif kind == "dcp":
        found = _dcp(directory, prefix)
    else:
        found = _universal(directory)
    if dtype is not None:
        found = replace(found, sources=tuple(_converted(s, dtype) for s in found.sources))
    return found


def optimizer_description(found: Found) -> str:
    """The ``backstay.optimizers`` header of an imported snapshot: one optimizer, its parameters, keys of their state."""
    schemas: dict[str, int] = {}
    of: dict[str, int] = {}
    for parameter, keys in found.states.items():
        schema = json.dumps(
            [[key, "plain", dtype.removeprefix("torch."), "cpu" if not like else None, None if like else [], None]
             for key, dtype, like in keys]
        )  # fmt: skip
        of[parameter] = schemas.setdefault(schema, len(schemas))
    body = {"groups": [sorted(of)], "schemas": [json.loads(schema) for schema in schemas], "of": of}
    return json.dumps([body] if of else [], separators=(",", ":"))


def _huggingface(directory: Path) -> Found:
    sources = []
    paths: dict[str, Path] = {}
    for tensor in huggingface.find_tensors(directory):
        torch_dtype = _SAFETENSORS.get(tensor.dtype)
        if torch_dtype is None:
            raise UsageError(f"{tensor.path}: {tensor.name} is of dtype {tensor.dtype}, which cannot be stored")
        size = _size_bytes(tensor.shape, getattr(torch, torch_dtype.removeprefix("torch.")))
        if tensor.end - tensor.begin != size:
            raise IntegrityError(
                f"{tensor.path}: {tensor.name} has {tensor.end - tensor.begin} bytes, {tensor.dtype} of shape "
                f"{list(tensor.shape)} has {size}; the file is damaged or mislabeled",
                reason="bad_file",
            )
        if paths.setdefault(tensor.name, tensor.path) != tensor.path:
            raise UsageError(
                f"{tensor.name} is in {paths[tensor.name].name} and in {tensor.path.name}, and no {huggingface.INDEX} says "
                "which is meant; leave the files of one model in the directory",
                reason="ambiguous_model",
            )
        sources.append(
            Source(
                name=f"model.{tensor.name}",
                torch_dtype=torch_dtype,
                shape=tensor.shape,
                size_bytes=tensor.end - tensor.begin,
                read=_file_reader(tensor.path, tensor.begin, tensor.end),
            )
        )
    return Found(sources=tuple(sources))


def _size_bytes(shape: Iterable[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _file_reader(path: Path, begin: int, end: int) -> Callable[[], bytes]:
    def read() -> bytes:
        with path.open("rb") as file:
            file.seek(begin)
            data = file.read(end - begin)
        if len(data) != end - begin:
            raise IntegrityError(f"{path} ends at byte {begin + len(data)}; it changed while it was read")
        return data

    return read


def _universal(directory: Path) -> Found:
    sources: list[Source] = []
    states: dict[str, tuple[tuple[str, str, bool], ...]] = {}
    left_out: list[str] = []
    folders = sorted(path for path in (directory / "zero").iterdir() if path.is_dir())
    for folder in folders:
        weight = folder / "fp32.pt"
        if not weight.is_file():
            left_out.append(f"{folder.name}: no fp32.pt")
            continue
        parameter = _atom(weight)
        sources.append(_tensor_source(f"model.{folder.name}", parameter, lambda path=weight: _atom(path)))  # type: ignore[misc]
        keys: list[tuple[str, str, bool]] = []
        for path in sorted(folder.glob("*.pt")):
            if path.name == "fp32.pt":
                continue
            value = _atom(path)
            is_like = value.shape == parameter.shape
            if not is_like and value.ndim:
                left_out.append(f"{folder.name}/{path.name}: shape {tuple(value.shape)}")
                continue
            name = f"optimizer.state.{folder.name}.{path.stem}"
            sources.append(_tensor_source(name, value, lambda path=path: _atom(path)))  # type: ignore[misc]
            keys.append((path.stem, str(value.dtype), is_like))
        if keys:
            states[folder.name] = tuple(keys)
    if not sources:
        raise UsageError(f"{directory}/zero holds no parameter with an fp32.pt", reason="no_model")
    match = re.search(r"(\d+)(?:_universal)?\Z", directory.name)
    return Found(sources=tuple(sources), states=states, step=int(match[1]) if match else None, left_out=tuple(left_out))


def _atom(path: Path) -> torch.Tensor:
    """The tensor of one file: a dictionary with ``param``, or a bare value (``step``)."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise IntegrityError(f"{path} cannot be read without running code: {error}", reason="bad_file") from error
    value = loaded.get("param") if isinstance(loaded, dict) else loaded
    if isinstance(value, (int, float)):
        value = torch.tensor(float(value))
    if not isinstance(value, torch.Tensor):
        raise IntegrityError(f"{path} holds a {type(value).__name__}, not a tensor", reason="bad_file")
    return value.detach()


def _dcp(directory: Path, prefix: str | None) -> Found:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = _read_metadata(directory / ".metadata")
    reader = _reader(FileSystemReader)(directory, metadata)
    tensors: dict[str, Any] = {
        name: item for name, item in metadata.state_dict_metadata.items() if isinstance(item, TensorStorageMetadata)
    }
    optimizer = next((p for p in ("optimizer.state.", "optim.state.") if any(n.startswith(p) for n in tensors)), "")
    if prefix is None:
        prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    models = {
        name: name.removeprefix(prefix)
        for name in tensors
        if name.startswith(prefix) and not (optimizer and name.startswith(optimizer))
    }
    sources = [_dcp_source(reader, f"model.{bare}", name, tensors[name]) for name, bare in sorted(models.items())]
    states: dict[str, list[tuple[str, str, bool]]] = {}
    taken = set(models)
    shapes = {bare: tuple(tensors[name].size) for name, bare in models.items()}
    for name in sorted(tensors):
        parameter, _, key = name.removeprefix(optimizer).rpartition(".")
        if optimizer and name.startswith(optimizer) and parameter in shapes:
            item = tensors[name]
            sources.append(_dcp_source(reader, f"optimizer.state.{parameter}.{key}", name, item))
            states.setdefault(parameter, []).append(
                (key, str(item.properties.dtype), tuple(item.size) == shapes[parameter])
            )
            taken.add(name)
    if not sources:
        raise UsageError(f"{directory} holds no tensor under {prefix!r}", reason="no_model")
    left_out = sorted(set(metadata.state_dict_metadata) - taken)
    match = re.search(r"(\d+)\Z", directory.name)
    return Found(
        sources=tuple(sources),
        states={name: tuple(keys) for name, keys in states.items()},
        step=int(match[1]) if match else None,
        left_out=tuple(left_out),
    )


def _dcp_source(reader: Any, name: str, key: str, item: Any) -> Source:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    dtype, shape = item.properties.dtype, tuple(item.size)

    def read() -> memoryview:
        target = {key: torch.empty(shape, dtype=dtype)}
        try:
            load(target, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # whatever a damaged file made its reader raise
            cause = next((failure for failure, _ in error.failures.values()), error)
            raise IntegrityError(
                f"{key} cannot be read from {reader.path}: {cause}; a file there is missing or damaged",
                reason="bad_file",
            ) from error
        return _bytes_of(target[key])

    return Source(name=name, torch_dtype=str(dtype), shape=shape, size_bytes=_size_bytes(shape, dtype), read=read)


def _reader(base: type[Any]) -> Callable[[Path, Any], Any]:
    class SafeReader(base):
        """Reads with a ``.metadata`` that was read without pickle; tensors come by ``weights_only``."""

        def __init__(self, path: Path, metadata: Any) -> None:
            super().__init__(path)
            self._safe = metadata

        def read_metadata(self, *_: Any, **__: Any) -> Any:
            return self._safe

    return SafeReader


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the record classes of DCP's metadata and nothing else."""

    _ALLOWED: Final = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "collections": {"OrderedDict"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(
            getattr(torch, name, None), (torch.dtype, torch.layout, torch.memory_format)
        ):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "PurePosixPath", "WindowsPath"):
            return _no_path
        if name in self._ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _check_memory_of(data: bytes) -> None:
    """Raise UnpicklingError if unpickling ``data`` takes memory out of proportion to its length.

    The unpickler allocates and clears its memo up to the highest index at once: four damaged bytes cost 32 GiB.
    """
    for operation, argument, _at in pickletools.genops(data):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"memo index {argument} in a pickle of {len(data)} bytes")
        if operation.name == "BYTEARRAY8":
            raise pickle.UnpicklingError("it holds a bytearray, which DCP never writes")


def _no_path(*parts: str) -> str:
    """Where the checkpoint once lay: of no use here."""
    return "/".join(parts)


def _read_metadata(path: Path) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    try:
        data = path.read_bytes()
        _check_memory_of(data)
        metadata = _MetadataUnpickler(io.BytesIO(data)).load()
    except FileNotFoundError:
        raise UsageError(f"{path.parent} is no DCP checkpoint: it has no .metadata", reason="unknown_format") from None
    except Exception as error:
        raise IntegrityError(
            f"{path} is not a DCP metadata file that can be trusted: {error}", reason="bad_file"
        ) from error
    if not isinstance(metadata, Metadata):
        raise IntegrityError(f"{path} holds a {type(metadata).__name__}, not DCP metadata", reason="bad_file")
    try:
        _check_metadata(metadata)
    except (AttributeError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{path} is not a DCP metadata file that can be used: {error}", reason="bad_file"
        ) from error
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    return metadata


def _check_metadata(metadata: Any) -> None:
    """What DCP's reader takes on trust: names of files inside the checkpoint, shapes that are shapes.

    Raises:
        ValueError, TypeError, AttributeError: it is not so.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    for index, stored in (metadata.storage_data or {}).items():
        name = PurePosixPath(stored.relative_path)
        if name.is_absolute() or ".." in name.parts or not name.parts or "\0" in stored.relative_path:
            raise ValueError(f"{index.fqn} is said to lie in {stored.relative_path!r}, outside the checkpoint")
        if not 0 <= stored.offset < MAX_COUNT or not 0 <= stored.length < MAX_COUNT:
            raise ValueError(f"{index.fqn} is said to lie at {stored.offset}, {stored.length} bytes long")
    for fqn, item in metadata.state_dict_metadata.items():
        if not isinstance(fqn, str):
            raise TypeError(f"a tensor is named {fqn!r}")
        if not isinstance(item, TensorStorageMetadata):
            continue
        boxes: list[Any] = [item.size, *(size for chunk in item.chunks for size in (chunk.offsets, chunk.sizes))]
        if not all(isinstance(n, int) and 0 <= n < MAX_COUNT for box in boxes for n in box):
            raise ValueError(f"{fqn} is of shape {tuple(item.size)}, cut in {len(item.chunks)}")
        if math.prod(item.size) >= MAX_COUNT or not isinstance(item.properties.dtype, torch.dtype):
            raise ValueError(f"{fqn} is of shape {tuple(item.size)} and dtype {item.properties.dtype!r}")


def _tensor_source(name: str, tensor: torch.Tensor, load: Callable[[], torch.Tensor]) -> Source:
    size = tensor.numel() * tensor.element_size()
    return Source(
        name=name,
        torch_dtype=str(tensor.dtype),
        shape=tuple(tensor.shape),
        size_bytes=size,
        read=lambda: _bytes_of(load()),
    )


def _converted(source: Source, dtype: torch.dtype) -> Source:
    """The same tensor in another dtype, if it is a floating-point tensor of the model."""
    before: torch.dtype = getattr(torch, source.torch_dtype.removeprefix("torch."))
    if not source.name.startswith("model.") or not before.is_floating_point or before == dtype:
        return source

    def read() -> memoryview:
        data = bytearray(source.read())
        tensor = torch.frombuffer(data, dtype=before) if data else torch.empty(0, dtype=before)
        return _bytes_of(tensor.to(dtype))

    return replace(source, torch_dtype=str(dtype), size_bytes=_size_bytes(source.shape, dtype), read=read)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(raw_memory.read_bytes(tensor.detach().contiguous()))
