"""Shard files in other hands: plain safetensors and torch's own DCP reader, in a process that cannot import backstay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")

from backstay.errors import IntegrityError, SnapshotNotFoundError, UsageError  # noqa: E402
from backstay.format import json_records  # noqa: E402
from backstay.format.digest import Digester, read_tensor, verify_chunks  # noqa: E402
from backstay.format.manifest import Manifest  # noqa: E402
from backstay.format.shard import STORAGE_RULES, TensorSpec, build_manifest, check_file, plan_layout  # noqa: E402
from backstay.ids import SnapshotKey  # noqa: E402
from backstayd.store.paths import RunPaths  # noqa: E402

DTYPES = sorted({str(value) for value in vars(torch).values() if isinstance(value, torch.dtype)})
WITHOUT_RULE = {"torch.qint8", "torch.quint8", "torch.qint32", "torch.quint4x2", "torch.quint2x4"}
# What the DCP reader can put into a tensor of the same dtype.
DCP_DTYPES = [
    "torch.bool", "torch.uint8", "torch.int8", "torch.uint16", "torch.int16", "torch.uint32", "torch.int32", "torch.uint64",
    "torch.int64", "torch.float16", "torch.bfloat16", "torch.float32", "torch.float64", "torch.complex64",
    "torch.float8_e4m3fn", "torch.float8_e5m2", "torch.float8_e4m3fnuz", "torch.float8_e5m2fnuz",
]  # fmt: skip
WITHOUT_BACKSTAY = """
import importlib.util, sys
assert sys.flags.isolated and importlib.util.find_spec("backstay") is None, "backstay must not be importable here"
assert not any("client" in part.split("/") for part in sys.path)
"""


def noise(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bits of any dtype (bool: 0 and 1)."""
    count = STORAGE_RULES[dtype].item_bytes
    for size in shape:
        count *= size
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2 if dtype == "torch.bool" else 256, (count,), dtype=torch.uint8, generator=generator)
    if count == 0:
        return torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
    return bits.view(getattr(torch, dtype.removeprefix("torch."))).reshape(shape)


def bits_of(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


class Writer:
    """Writes the shards of one snapshot where the daemon would keep them."""

    def __init__(self, memory_dir: Path, world_size: int) -> None:
        self.paths, self.key, self.world_size = RunPaths(memory_dir, "default/gpt"), SnapshotKey(3, 1200), world_size
        self.directory = self.paths.snapshot(self.key)
        self.directory.mkdir(parents=True)

    def write(
        self, rank: int, chunks: list[tuple[TensorSpec, torch.Tensor]], aliases: dict[str, str] | None = None
    ) -> tuple[Path, Manifest]:
        layout = plan_layout([spec for spec, _ in chunks], metadata={"mine": "kept"}, aliases=aliases)
        data = bytearray(layout.header.ljust(layout.size_bytes))
        for spec, tensor in chunks:
            if not spec.is_empty_chunk:
                entry = layout.entry(spec.name)
                data[entry.begin : entry.end] = bits_of(tensor)
        digester = Digester(layout)
        digester.update_span(data)
        chunk_crcs, tensor_crcs = digester.finish()
        manifest = build_manifest(
            layout,
            run="default/gpt",
            attempt=self.key.attempt,
            step=self.key.step,
            rank=rank,
            world_size=self.world_size,
            world_id="w",
            chunk_crcs=chunk_crcs,
            tensor_crcs=tensor_crcs,
        )
        path = self.paths.shard(self.key, rank, self.world_size)
        path.write_bytes(data)
        self.paths.manifest(self.key, rank, self.world_size).write_bytes(json_records.dumps(manifest))
        return path, manifest

    def write_parity(self) -> None:
        """What lies beside the shards of a protected snapshot."""
        plan_id = "ab" * 16
        self.paths.parity(self.key).mkdir()
        self.paths.plan(self.key, plan_id).write_bytes(b"{}")
        self.paths.fragment(self.key, plan_id, stripe=2, index=0).write_bytes(b"parity bytes")
        self.paths.fragment_record(self.key, plan_id, stripe=2, index=0).write_bytes(b"{}")


def run_without_backstay(code: str, **arguments: object) -> None:
    """Run ``code`` isolated: ``arguments`` are its globals; site-packages is on its path, without what .pth files add."""
    packages = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    head = f"import sys, json\nsys.path += {packages!r}\nglobals().update(json.loads({json.dumps(json.dumps(arguments))}))\n"
    command = [sys.executable, "-I", "-S", "-c", head + WITHOUT_BACKSTAY + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def test_every_dtype_of_torch_has_a_rule_or_is_known_to_have_none() -> None:
    refused = set()
    for dtype in DTYPES:
        try:
            plan_layout([TensorSpec.whole("model.w", dtype, (2,))])
        except UsageError as error:
            refused.add(dtype)
            assert f"'model.w' is of dtype {dtype}," in str(error)  # noqa: PT017 - which are refused is asserted below
    assert refused == WITHOUT_RULE & set(DTYPES)


@pytest.mark.parametrize("dtype", sorted(STORAGE_RULES))
def test_a_rule_knows_the_size_of_its_dtype(dtype: str) -> None:
    known = getattr(torch, dtype.removeprefix("torch."), None)
    if known is None:
        pytest.skip(f"this torch has no {dtype}")
    assert STORAGE_RULES[dtype].item_bytes == known.itemsize


def test_every_dtype_comes_back_bit_for_bit_through_safe_open_and_read_tensor(tmpfs_dir: Path) -> None:
    dtypes = [dtype for dtype in DTYPES if dtype in STORAGE_RULES]
    shapes: list[tuple[int, ...]] = [(), (3,), (0,), (4, 0), (5, 3), (2, 1, 7), (64,)]
    tensors = {f"{dtype}/{shape}": noise(dtype, shape) for dtype in dtypes for shape in shapes}
    chunks = [(TensorSpec.whole(name, str(tensor.dtype), tensor.shape), tensor) for name, tensor in tensors.items()]
    path, manifest = Writer(tmpfs_dir, 1).write(0, chunks)
    fd = os.open(path, os.O_RDONLY)
    try:
        check_file(fd, manifest)
        for name, tensor in tensors.items():
            assert read_tensor(fd, manifest, name) == bits_of(tensor), name
    finally:
        os.close(fd)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata()["mine"] == "kept"
        assert sorted(file.keys()) == sorted(tensors)
        for name, tensor in tensors.items():
            assert bits_of(file.get_tensor(name)) == bits_of(tensor), name
            if str(tensor.dtype) in DCP_DTYPES:
                assert (file.get_tensor(name).dtype, file.get_tensor(name).shape) == (tensor.dtype, tensor.shape)


def test_a_flipped_bit_is_found_by_chunk_and_by_tensor(tmpfs_dir: Path) -> None:
    tensor = noise("torch.float32", (1000, 100))
    path, manifest = Writer(tmpfs_dir, 1).write(
        0, [(TensorSpec.whole("w", "torch.float32", (1000, 100)), tensor)], {"tied": "w"}
    )
    data = bytearray(path.read_bytes())
    verify_chunks(data, manifest, 0)
    fd = os.open(path, os.O_RDWR)
    try:
        assert read_tensor(fd, manifest, "tied") == bits_of(tensor)
        data[300_000] ^= 1
        os.pwrite(fd, data[300_000:300_001], 300_000)
        with pytest.raises(IntegrityError, match="'w'"):
            read_tensor(fd, manifest, "tied")
        with pytest.raises(SnapshotNotFoundError, match="'absent'"):
            read_tensor(fd, manifest, "absent")
        with pytest.raises(IntegrityError, match="chunk 1 of 2"):
            verify_chunks(data, manifest, 0)
    finally:
        os.close(fd)


def test_safe_open_reads_a_shard_where_there_is_no_backstay(tmpfs_dir: Path) -> None:
    tensor = noise("torch.bfloat16", (7, 5))
    path, _ = Writer(tmpfs_dir, 1).write(0, [(TensorSpec.whole("model.w", "torch.bfloat16", (7, 5)), tensor)])
    run_without_backstay(
        """
import torch, safetensors
with safetensors.safe_open(path, "pt") as file:
    tensor = file.get_tensor("model.w")
assert bytes(tensor.view(torch.uint8).flatten().numpy()).hex() == bits, tensor
""",
        path=str(path),
        bits=bits_of(tensor).hex(),
    )


def test_dcp_loads_and_reshards_a_snapshot_where_there_is_no_backstay(tmpfs_dir: Path) -> None:
    """Rows cut unequally over three ranks (one without any), scalars and per-rank state, beside manifests and parity."""
    cuts = [(0, 2), (2, 2), (2, 7)]
    rows = {dtype: noise(dtype, (7, 6), seed) for seed, dtype in enumerate(DCP_DTYPES)}
    writer = Writer(tmpfs_dir, len(cuts))
    whole: dict[str, torch.Tensor] = {f"model.{dtype}": tensor for dtype, tensor in rows.items()}
    for rank, (begin, end) in enumerate(cuts):
        chunks = [
            (TensorSpec(f"model.{dtype}", dtype, (end - begin, 6), (begin, 0), (7, 6)), tensor[begin:end])
            for dtype, tensor in rows.items()
        ]
        own = {
            f"rank-{rank:05d}.step": noise("torch.float32", (), rank),
            f"rank-{rank:05d}.nothing": torch.empty(0, 3),
            f"rank-{rank:05d}.state.json": noise("torch.uint8", (1000,), rank),
            f"rank-{rank:05d}.odd": noise("torch.float8_e8m0fnu", (9,), rank),
            f"rank-{rank:05d}.wide": noise("torch.complex128", (2, 2), rank),
        }
        writer.write(rank, chunks + [(TensorSpec.whole(n, str(t.dtype), t.shape), t) for n, t in own.items()])
        own[f"rank-{rank:05d}.odd"] = own[f"rank-{rank:05d}.odd"].view(torch.uint8)
        own[f"rank-{rank:05d}.wide"] = torch.view_as_real(own[f"rank-{rank:05d}.wide"])
        whole |= own
    writer.write_parity()
    names = sorted(path.name for path in writer.directory.iterdir())
    assert len([name for name in names if name.endswith(".manifest.json")]) == 3
    assert "parity" in names
    expected = {name: (str(t.dtype), list(t.shape), bits_of(t).hex()) for name, t in whole.items()}
    run_without_backstay(
        """
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader
reader = HuggingFaceStorageReader(directory)
assert sorted(reader.read_metadata().state_dict_metadata) == sorted(expected)
state = {}
for name, (dtype, shape, bits) in expected.items():
    dtype = getattr(torch, dtype.removeprefix("torch."))
    blank = torch.full((len(bits) // 2,), 1, dtype=torch.uint8)
    state[name] = blank.view(dtype).reshape(shape) if bits else torch.empty(shape, dtype=dtype)
dcp.load(state, storage_reader=HuggingFaceStorageReader(directory), no_dist=True)
for name, (dtype, shape, bits) in expected.items():
    found = state[name]
    assert str(found.dtype) == dtype and list(found.shape) == shape, name
    if bits:
        assert bytes(found.contiguous().reshape(-1).view(torch.uint8).numpy()).hex() == bits, name
""",
        directory=str(writer.directory),
        expected=expected,
    )
