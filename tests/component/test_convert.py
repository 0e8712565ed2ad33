"""Models out of shards and shards out of other people's checkpoints: real files of DCP, DeepSpeed and transformers."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # noqa: E402
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load  # noqa: E402
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save  # noqa: E402

from backstay.convert import foreign_checkpoints, huggingface, import_checkpoint, snapshot_writer  # noqa: E402
from backstay.convert.consolidate import (  # noqa: E402
    Shard,
    aliases_of,
    choose_cover,
    differing_copies,
    place,
    whole_tensors,
)
from backstay.errors import BackstayError, IntegrityError, SnapshotNotFoundError, UsageError  # noqa: E402
from backstay.format import json_records, shard  # noqa: E402
from backstay.format.digest import Digester  # noqa: E402
from backstay.format.manifest import Manifest  # noqa: E402
from tests.kit.wording import refuses  # noqa: E402

RUN = "default/gpt"


class FileBytes:
    """A shard file as its readers see it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_into(self, offset: int, view: memoryview) -> None:
        with self.path.open("rb") as file:
            file.seek(offset)
            assert file.readinto(view) == len(view)


def open_directory(directory: Path) -> list[Shard]:
    found = [
        Shard(
            manifest=json_records.loads(Manifest, path.read_bytes()),
            bytes=FileBytes(Path(str(path).replace(".manifest.json", ".safetensors"))),
        )
        for path in directory.glob("*.manifest.json")
    ]
    return sorted(found, key=lambda s: s.manifest.rank)


def write_pieces(
    directory: Path,
    rank: int,
    world_size: int,
    pieces: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]],
    **aliases: str,
) -> None:
    """One shard of pieces: name to (tensor, offsets, global shape)."""
    specs = [
        shard.TensorSpec(name, str(t.dtype), tuple(t.shape), offsets, whole)
        for name, (t, offsets, whole) in pieces.items()
    ]
    layout = shard.plan_layout(specs, aliases=aliases)
    data = bytearray(layout.header)
    for entry in layout.entries:
        tensor = pieces[entry.name][0].contiguous().reshape(-1).view(torch.uint8)
        data += bytes(tensor.tolist())
    digester = Digester(layout)
    digester.update_span(data)
    chunk_crcs, tensor_crcs = digester.finish()
    manifest = shard.build_manifest(
        layout, run=RUN, attempt=1, step=5, rank=rank, world_size=world_size, world_id="w",
        chunk_crcs=chunk_crcs, tensor_crcs=tensor_crcs,
    )  # fmt: skip
    stem = directory / f"rank-{rank:05d}-of-{world_size:05d}"
    directory.mkdir(exist_ok=True)
    Path(f"{stem}.safetensors").write_bytes(data)
    Path(f"{stem}.manifest.json").write_bytes(json_records.dumps(manifest))


def convert(source: Path, target: Path, *options: str) -> dict[str, Any]:
    arguments = ["--from", str(source), "--to", str(target), "--run", RUN, *options]
    command = [sys.executable, "-m", "backstay.convert.import_checkpoint", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    answer = json.loads(done.stdout.splitlines()[-1])
    answer["status"] = done.returncode
    return dict(answer)


@given(st.integers(0, 2**32), st.integers(1, 3))
def test_boxes_cut_anyhow_make_the_whole_tensor_again(seed: int, ndim: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 6) for _ in range(ndim))
    whole = torch.arange(torch.Size(shape).numel(), dtype=torch.int16).reshape(shape)
    cuts = [sorted({0, size, *(rng.randrange(size + 1) for _ in range(2))}) for size in shape]
    boxes = [
        (tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
        for spans in itertools.product(*(list(itertools.pairwise(c)) for c in cuts))
    ]
    rng.shuffle(boxes)
    made = bytearray(whole.numel() * 2)
    for index in choose_cover("t", boxes, shape):
        box = boxes[index]
        part = whole
        for dim, (offset, size) in enumerate(zip(*box, strict=True)):
            part = part.narrow(dim, offset, size)
        place(memoryview(part.contiguous().numpy().tobytes()), box, memoryview(made), shape, item=2)
    assert bytes(made) == whole.numpy().tobytes()
    if len(boxes) > 1:
        with pytest.raises(IntegrityError, match="of"):
            choose_cover("t", boxes[1:], shape)


def test_a_model_cut_by_rows_and_columns_is_exported_whole(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows, columns = torch.randn(7, 5), torch.randn(4, 6).bfloat16()
    scalar, mean = torch.tensor(3), torch.randn(4)
    world = tmp_path / "snapshot"
    write_pieces(world, 0, 2, {
        "model.rows": (rows[:4], (0, 0), (7, 5)), "model.columns": (columns[:, :2], (0, 0), (4, 6)),
        "model.scalar": (scalar, (), ()), "model.mean": (mean, (0,), (4,)),
        "optimizer.state.rows.exp_avg": (rows, (0, 0), (7, 5)),
    }, **{"model.tied": "model.rows"})  # fmt: skip
    write_pieces(world, 1, 2, {
        "model.rows": (rows[4:], (4, 0), (7, 5)), "model.columns": (columns[:, 2:], (0, 2), (4, 6)),
        "rank-00001.model.mean": (mean + 1, (0,), (4,)), "rank-00001.model.stage": (rows, (0, 0), (7, 5)),
    })  # fmt: skip
    shards = open_directory(world)
    written = huggingface.write_model(whole_tensors(shards), tmp_path / "hf")
    loaded = load_file(written.files[0])
    expected = {"rows": rows, "columns": columns, "scalar": scalar, "mean": mean, "stage": rows}
    assert loaded.keys() == expected.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in expected.items()
    )
    assert differing_copies(shards) == {"mean": (0, 1)}
    assert aliases_of(shards) == {"tied": "rows"}


def test_an_export_is_cut_into_files_with_an_index_and_refuses_a_directory_in_use(tmp_path: Path) -> None:
    tensors = {f"model.t{i}": (torch.full((100, 10), float(i)), (0, 0), (100, 10)) for i in range(5)}
    write_pieces(tmp_path / "s", 0, 1, tensors)
    shards = open_directory(tmp_path / "s")
    written = huggingface.write_model(whole_tensors(shards), tmp_path / "hf", file_bytes=9_000)
    index = json.loads((tmp_path / "hf" / huggingface.INDEX).read_text())
    assert index["metadata"]["total_size"] == 20_000
    assert len(written.files) == 4
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "hf" / file)[name], tensors[f"model.{name}"][0])
    with pytest.raises(UsageError, match="already"):
        huggingface.write_model(whole_tensors(shards), tmp_path / "hf")
    assert {found.name for found in huggingface.find_tensors(tmp_path / "hf")} == {f"t{i}" for i in range(5)}


def test_a_flipped_bit_stops_an_export_and_leaves_nothing(tmp_path: Path) -> None:
    write_pieces(tmp_path / "s", 0, 1, {"model.w": (torch.zeros(1000), (0,), (1000,))})
    path = next((tmp_path / "s").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="chunk"):
        huggingface.write_model(whole_tensors(open_directory(tmp_path / "s")), tmp_path / "hf")
    assert list((tmp_path / "hf").iterdir()) == []
    with refuses(SnapshotNotFoundError, "no_tensors"):
        next(whole_tensors(open_directory(tmp_path / "s"), prefix="ema."))


def test_a_real_transformers_model_comes_in_and_goes_out_as_it_was(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=16)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    answer = convert(tmp_path / "in", tmp_path / "shards", "--shard-bytes", "30000")
    assert answer["status"] == 0, answer
    assert answer["shards"] > 1
    huggingface.write_model(whole_tensors(open_directory(tmp_path / "shards")), tmp_path / "out")
    config.save_pretrained(tmp_path / "out")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_dcp_checkpoint_comes_in_with_its_optimizer(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    torch.manual_seed(2)
    model = torch.nn.Linear(6, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    own, moments = get_state_dict(model, optimizer)
    dcp_save({"model": own, "optim": moments, "note": {"a": 1}}, checkpoint_id=tmp_path / "step-40", no_dist=True)
    answer = convert(tmp_path / "step-40", tmp_path / "shards")
    assert (answer["status"], answer["format"], answer["step"], answer["optimizer_parameters"]) == (0, "dcp", 40, 2), (
        answer
    )
    assert "note.a" in answer["left_out"]
    weight, moment = torch.zeros(3, 6), torch.zeros(3, 6)
    target = {"model.weight": weight, "optimizer.state.weight.exp_avg": moment}
    dcp_load(target, storage_reader=HuggingFaceStorageReader(str(tmp_path / "shards")), no_dist=True)
    assert torch.equal(weight, model.weight)
    assert torch.equal(moment, optimizer.state[model.weight]["exp_avg"])


def test_damaged_metadata_costs_no_more_memory_than_its_length(tmp_path: Path) -> None:
    """Four bytes of a memo index made the unpickler allocate and clear memory for as many objects as they say."""
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / ".metadata").write_bytes(b"\x80\x02]r" + struct.pack("<I", 1 << 26) + b".")
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError) as caught:
            foreign_checkpoints.read_checkpoint(tmp_path / "damaged", "dcp")
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.reason == "bad_file"
    assert peak_bytes < 16 << 20


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / ".metadata").write_bytes(pickle.dumps(Evil()))
    answer = convert(tmp_path / "evil", tmp_path / "shards")
    assert answer["status"] == 1
    assert "system" in answer["message"]
    assert not (tmp_path / "ran").exists()


UNIVERSAL = """
import os, sys, torch, deepspeed
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo")
torch.manual_seed(3)
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
config = {"train_batch_size": 2, "zero_optimization": {"stage": 1}, "bf16": {"enabled": True},
          "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
engine, optimizer, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
for _ in range(2):
    engine.backward(engine(torch.randn(2, 8, dtype=torch.bfloat16)).float().pow(2).mean())
    engine.step()
state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
engine.save_checkpoint(sys.argv[1], tag="global_step2", client_state=state)
torch.save({n: p.detach() for n, p in model.named_parameters()}, sys.argv[1] + "/expected.pt")
"""


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("deepspeed_compiled")
def test_a_deepspeed_universal_checkpoint_comes_in(tmp_path: Path) -> None:
    saved, universal = tmp_path / "ds", tmp_path / "global_step2_universal"
    saved.mkdir()
    (tmp_path / "train.py").write_text(UNIVERSAL)
    arguments = ["--input_folder", str(saved / "global_step2"), "--output_folder", str(universal)]
    for command in (
        [sys.executable, str(tmp_path / "train.py"), str(saved)],
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments, "--num_extract_workers", "1",
         "--num_merge_workers", "1"],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    answer = convert(universal, tmp_path / "shards", "--dtype", "bfloat16")
    assert (answer["status"], answer["format"], answer["step"], answer["optimizer_parameters"]) == (
        0,
        "universal",
        2,
        4,
    )
    expected = torch.load(saved / "expected.pt", weights_only=True)
    stored = load_file(next((tmp_path / "shards").glob("*.safetensors")))
    for name, tensor in expected.items():
        assert torch.equal(stored[f"model.{name}"], tensor)
        assert stored[f"optimizer.state.{name}.exp_avg"].shape == tensor.shape


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda d: None, "no checkpoint known here"),
        (lambda d: (d / "m.safetensors").write_bytes(b"\xff" * 40), "not a whole safetensors file"),
        (lambda d: (d / "zero").mkdir(), "no parameter"),
        (lambda d: (d / ".metadata").write_bytes(b"junk"), "not a DCP metadata file"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_words(tmp_path: Path, make: Any, problem: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    make(source)
    with pytest.raises(BackstayError, match=problem):
        foreign_checkpoints.read_checkpoint(source, foreign_checkpoints.detect(source))
    assert convert(source, tmp_path / "out")["status"] == 1
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_truncated_file_named_by_an_index_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100), "b": torch.ones(100)}, tmp_path / "m.safetensors")
    (tmp_path / huggingface.INDEX).write_text(json.dumps({"weight_map": {"a": "m.safetensors", "b": "m.safetensors"}}))
    assert len(list(huggingface.find_tensors(tmp_path))) == 2
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data[:-10])
    with pytest.raises(IntegrityError, match="truncated"):
        list(huggingface.find_tensors(tmp_path))
    (tmp_path / huggingface.INDEX).write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
    with pytest.raises(IntegrityError, match="outside"):
        list(huggingface.find_tensors(tmp_path))


def test_a_tensor_in_two_files_without_an_index_or_of_another_size_than_it_says_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10), "b": torch.ones(10)}, tmp_path / "m.safetensors")
    save_file({"a": torch.ones(10)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"a is in m\.safetensors and in other\.safetensors"):
        foreign_checkpoints.read_checkpoint(tmp_path, "huggingface")
    (tmp_path / "other.safetensors").unlink()
    data = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(data.replace(b'"F32"', b'"F64"', 1))
    with pytest.raises(IntegrityError, match=r"has 40 bytes, F64 of shape \[10\] has 80"):
        foreign_checkpoints.read_checkpoint(tmp_path, "huggingface")


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), lambda path: os.truncate(path, 200)])
def test_a_dcp_checkpoint_whose_file_is_missing_or_cut_is_refused_in_words(tmp_path: Path, harm: Any) -> None:
    source = tmp_path / "source-5"
    dcp_save({"model": {"w": torch.arange(100.0)}}, checkpoint_id=str(source))
    harm(next(source.glob("*.distcp")))
    answer = convert(source, tmp_path / "out")
    assert (answer["status"], answer["error_class"]) == (1, "IntegrityError")
    assert "model.w cannot be read" in answer["message"]
    assert "missing or damaged" in answer["message"]


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "a/../../outside.distcp", "", "."])
def test_dcp_metadata_that_names_a_file_outside_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source-5"
    dcp_save({"model": {"w": torch.arange(100.0)}}, checkpoint_id=str(source), no_dist=True)
    (data,) = source.glob("*.distcp")
    data.rename(tmp_path / "outside.distcp")  # what it would read is there, and whole
    metadata = pickle.loads((source / ".metadata").read_bytes())
    for stored in metadata.storage_data.values():
        object.__setattr__(stored, "relative_path", name)
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(IntegrityError, match="outside the checkpoint"):
        foreign_checkpoints.read_checkpoint(source, "dcp")


def test_the_importer_stores_what_writing_was_given(tmp_path: Path) -> None:
    source = snapshot_writer.Source(
        name="model.w",
        torch_dtype="torch.float32",
        shape=(3,),
        size_bytes=12,
        read=lambda: torch.ones(3).numpy().tobytes(),
    )
    identity = snapshot_writer.Identity(run=RUN, attempt=1, step=0, writer="test")
    manifests = snapshot_writer.write_shards(
        [source], tmp_path / "s", identity=identity, metadata={shard.IMPORTED_KEY: "huggingface"}
    )
    assert [m.world_size for m in manifests] == [1]
    assert import_checkpoint.main(["--from", str(tmp_path / "s"), "--to", str(tmp_path / "t"), "--run", RUN]) == 0
