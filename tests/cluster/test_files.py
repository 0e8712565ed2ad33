"""The fsspec scheme: tools that only know folders write into memory and read from it. Real daemons, one and several ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as dcp

import backstay.files
from backstay.errors import UnavailableError, UsageError
from backstay.stores.file_store import FileStore
from backstay.testing import LocalCluster
from backstay.testing.fixtures import LocalClusterFactory as NewCluster
from backstay.trainer.process_group import World as Place
from tests.kit.dcp_world import World
from tests.kit.wording import refuses, says

CLUSTER = {"nodes": 1, "parity": 0, "lease_s": 1.0}
ROOT = Path(__file__).parents[2]
RUN = "default/dcp"


@pytest.fixture
def url(cluster: LocalCluster, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a run of its own; forgotten at the end."""
    monkeypatch.setenv("BACKSTAY_SOCKET", str(cluster.nodes[0].socket))
    warnings.simplefilter("ignore", UserWarning)  # DCP's, about a single process
    made = f"backstay://files/{request.node.name.removeprefix('test_')[:90]}"
    yield made
    backstay.files.finish(made)


def write(url: str, data: bytes) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data)


def read(url: str) -> bytes:
    with fsspec.open(url, "rb") as file:
        return bytes(file.read())


def test_a_model_folder_comes_back_after_a_restart(url: str) -> None:
    """What a tool does that only knows files: torch.save, JSON, a subfolder, an empty file, listing."""
    weights = {"w": torch.randn(100, 7), "b": torch.ones(3, dtype=torch.bfloat16)}
    with fsspec.open(f"{url}/checkpoint-500/pytorch_model.bin", "wb") as file:
        torch.save(weights, file)
    with fsspec.open(f"{url}/checkpoint-500/config.json", "w") as file:
        json.dump({"name": "é"}, file)
    write(f"{url}/checkpoint-500/tokenizer/empty", b"")
    backstay.files.seal(f"{url}/checkpoint-500")
    assert backstay.files.begin(url) == 500
    fs = fsspec.filesystem("backstay")
    assert fs.ls(url, detail=False) == [f"{url}/checkpoint-500".removeprefix("backstay://")]
    assert [path.rpartition("checkpoint-500/")[2] for path in fs.find(url)] == [
        "config.json",
        "pytorch_model.bin",
        "tokenizer/empty",
    ]
    with fsspec.open(f"{url}/checkpoint-500/pytorch_model.bin", "rb") as file:
        found = torch.load(file, weights_only=True)
    assert torch.equal(found["w"], weights["w"])
    assert torch.equal(found["b"], weights["b"])
    with fsspec.open(f"{url}/checkpoint-500/config.json", "r") as file:
        assert json.load(file) == {"name": "é"}
    assert read(f"{url}/checkpoint-500/tokenizer/empty") == b""
    assert fs.isdir(f"{url}/checkpoint-500/tokenizer")
    assert fs.isfile(f"{url}/checkpoint-500/config.json")
    assert not fs.exists(f"{url}/checkpoint-400")


def test_a_folder_of_dcp_is_written_read_and_written_again_without_another_word(url: str) -> None:
    state = {"a": torch.arange(1000.0), "n": 3}
    for step in (10, 20):
        state["a"] += step
        dcp.save(state, checkpoint_id=f"{url}/step-{step}")
    future = dcp.async_save(state, checkpoint_id=f"{url}/step-30")
    future.result()
    here = {"a": torch.zeros(1000), "n": 0}
    dcp.load(here, checkpoint_id=f"{url}/step-30")  # in the same life
    assert torch.equal(here["a"], torch.arange(1000.0) + 30)
    backstay.files.begin(url)
    later = {"a": torch.zeros(1000), "n": 0}
    dcp.load(later, checkpoint_id=f"{url}/step-30")
    assert torch.equal(later["a"], torch.arange(1000.0) + 30)
    assert later["n"] == 3


def test_a_sealed_folder_does_not_change_and_two_are_not_open_at_once(url: str) -> None:
    write(f"{url}/step-2/a", b"2")
    with refuses(UsageError, "two_steps_open", 1, 2):
        write(f"{url}/step-1/a", b"1")
    backstay.files.seal(f"{url}/step-2")
    with refuses(UsageError, "sealed", "step 2"):
        write(f"{url}/step-2/b", b"2")
    fs = fsspec.filesystem("backstay")
    with pytest.raises(PermissionError, match="sealed"):
        fs.rm(f"{url}/step-2/a")
    with pytest.raises(PermissionError, match="step-2/a"):
        fs.mv(f"{url}/step-2/a", f"{url}/step-2/b")
    assert read(f"{url}/step-2/a") == b"2"


def test_the_first_file_of_a_later_folder_says_that_the_one_before_is_whole(url: str) -> None:
    write(f"{url}/runs/global_step1/mp_rank_00/x", b"1")
    write(f"{url}/runs/global_step2/mp_rank_00/x", b"2")
    assert backstay.files.store_of(url).newest_step == 1
    assert backstay.files.begin(url) == 1, "step 2 was not sealed"
    assert read(f"{url}/runs/global_step1/mp_rank_00/x") == b"1"
    write(f"{url}/final/x", b"after")
    backstay.files.seal(f"{url}/final")
    assert backstay.files.begin(url) == 2, "a folder without a number is the next step"
    assert read(f"{url}/final/x") == b"after"


def test_a_file_outside_of_folders_is_carried_from_snapshot_to_snapshot(url: str) -> None:
    write(f"{url}/latest", b"step-1")
    write(f"{url}/step-1/a", b"1")
    backstay.files.seal(f"{url}/step-1")
    backstay.files.begin(url)
    assert read(f"{url}/latest") == b"step-1"
    write(f"{url}/step-2/a", b"2")
    backstay.files.seal(f"{url}/step-2")
    backstay.files.begin(url)
    assert read(f"{url}/latest") == b"step-1"
    assert read(f"{url}/step-2/a") == b"2"


def test_open_files_are_renamed_removed_appended_to_and_copied(url: str) -> None:
    fs = fsspec.filesystem("backstay")
    fs.makedirs(f"{url}/step-1", exist_ok=True)
    write(f"{url}/step-1/a.tmp", b"one")
    fs.mv(f"{url}/step-1/a.tmp", f"{url}/step-1/a")
    with fs.open(f"{url}/step-1/a", "ab") as file:
        file.write(b"-two")
    fs.cp_file(f"{url}/step-1/a", f"{url}/step-1/b")
    write(f"{url}/step-1/c", b"gone")
    fs.rm(f"{url}/step-1/c")
    with pytest.raises(FileExistsError):
        fs.open(f"{url}/step-1/a", "xb")
    with fs.open(f"{url}/step-1/d", "wb") as file:  # as DCP does when a write fails
        file.write(b"half")
        fs.rm(f"{url}/step-1/d")
    backstay.files.seal(f"{url}/step-1")
    backstay.files.begin(url)
    assert sorted(path.rpartition("/")[2] for path in fs.find(f"{url}/step-1")) == ["a", "b"]
    assert read(f"{url}/step-1/b") == b"one-two"


def test_without_a_daemon_the_error_says_where_it_was_looked_for(tmp_path: Path) -> None:
    store = FileStore(run_id="nowhere", socket=str(tmp_path / "sock"))
    with refuses(UnavailableError, "no_daemon", tmp_path / "sock"):
        store.begin(deadline_s=0.5)
    with refuses(UsageError, "not_begun", "begin()"):
        store.write(1, "x", b"")


@pytest.mark.parametrize("url", ["backstay://job", "s3://bucket/run/step-1", None, 3])
def test_what_names_no_run_is_refused(url: Any) -> None:
    with refuses(UsageError, "bad_url", url, "backstay://<job>/<run_id>/<folder>"):
        backstay.files.seal(url)


def test_a_folder_into_which_nothing_was_written_does_not_take_the_place_of_the_one_before(url: str) -> None:
    write(f"{url}/step-1/a", b"1")
    backstay.files.seal(f"{url}/step-1")
    with refuses(UsageError, "empty_step", "step 9"):
        backstay.files.seal(f"{url}/step-9")
    write(f"{url}/step-2/a", b"2")
    with refuses(UsageError, "empty_step", "step 9", "step 2"):
        backstay.files.seal(f"{url}/step-9")
    with refuses(UsageError, "bad_argument", "timeout_s", "str", "'1'"):
        backstay.files.seal(f"{url}/step-2", timeout_s="1")  # type: ignore[arg-type]
    backstay.files.seal(f"{url}/step-2")
    assert read(f"{url}/step-2/a") == b"2"


def test_what_a_transaction_wrote_is_there_when_it_ends_and_its_folder_is_whole(url: str) -> None:
    fs = fsspec.filesystem("backstay")
    with fs.transaction, fs.open(f"{url}/final/a", "wb") as file:
        file.write(b"1")
        assert not fs.exists(f"{url}/final/a")
    assert backstay.files.begin(url) == 1, "the folder was sealed"
    assert read(f"{url}/final/a") == b"1"
    with pytest.raises(RuntimeError, match="interrupted"), fs.transaction:  # noqa: PT012
        fs.pipe_file(f"{url}/final/b", b"2")
        raise RuntimeError("interrupted")
    assert not fs.exists(f"{url}/final/b")
    with fs.transaction, fs.open(f"{url}/latest", "w") as text:
        text.write("final")
    assert read(f"{url}/latest") == b"final"
    write(f"{url}/final/c", b"3")
    backstay.files.seal(f"{url}/final")
    assert backstay.files.begin(url) == 2
    assert fs.find(f"{url}/final") == [f"{url}/final/c".removeprefix("backstay://")]


def test_lightning_saves_its_checkpoints_there_and_goes_on_from_one(url: str) -> None:
    lightning = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.demos.boring_classes import BoringModel

    def trainer(steps: int) -> Any:
        saving = ModelCheckpoint(dirpath=f"{url}/checkpoints", every_n_train_steps=1, save_top_k=1, save_last=True)
        return lightning.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=[saving], logger=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip

    model = BoringModel()
    trainer(2).fit(model)
    assert backstay.files.begin(url) is not None
    again, later = BoringModel(), trainer(3)
    later.fit(again, ckpt_path=f"{url}/checkpoints/last.ckpt")
    assert later.global_step == 3
    with fsspec.open(f"{url}/checkpoints/last.ckpt", "rb") as file:
        found = torch.load(file, weights_only=True)
    assert found["global_step"] == 3
    assert torch.equal(found["state_dict"]["layer.weight"], again.layer.weight)


def test_an_open_file_knows_its_size_and_is_read_from_its_end_and_cut(url: str) -> None:
    fs = fsspec.filesystem("backstay")
    write(f"{url}/step-1/a", b"first\nsecond\nthird\n")
    assert fs.tail(f"{url}/step-1/a", 6) == b"third\n"
    assert fs.cat_file(f"{url}/step-1/a", -6, -1) == b"third"
    assert fs.cat_ranges([f"{url}/step-1/a"] * 2, [0, -6], [5, None]) == [b"first", b"third\n"]
    assert fs.read_block(f"{url}/step-1/a", 2, 6, delimiter=b"\n") == b"second\n"
    with fs.open(f"{url}/step-1/a", "rb") as file:
        assert file.size == 19
    with fs.open(f"{url}/step-1/b", "wb") as file:
        file.write(b"0123456789")
        assert file.size == 10
        file.seek(4)
        assert file.truncate() == 4
        assert file.truncate(6) == 6
        file.write(b"x")
    assert read(f"{url}/step-1/b") == b"0123x\0"


def test_files_are_deleted_by_glob_and_directories_renamed(url: str) -> None:
    fs = fsspec.filesystem("backstay")
    for name in ("a.tmp", "b.tmp", "keep", "sub/x", "sub/deep/y"):
        write(f"{url}/step-1/{name}", name.encode())
    fs.rm(f"{url}/step-1/*.tmp")
    fs.mv(f"{url}/step-1/sub", f"{url}/step-1/moved")
    left = [path.rpartition("step-1/")[2] for path in fs.find(f"{url}/step-1")]
    assert left == ["keep", "moved/deep/y", "moved/x"]
    assert read(f"{url}/step-1/moved/deep/y") == b"sub/deep/y"
    with refuses(UsageError, "two_steps_open", 1, 2):
        fs.mv(f"{url}/step-1/moved", f"{url}/step-2/moved")
    with pytest.raises(FileNotFoundError):
        fs.mv(f"{url}/step-1/nothing", f"{url}/step-1/other")
    write(f"{url}/latest.tmp", b"step-1")
    fs.mv(f"{url}/latest.tmp", f"{url}/latest")
    backstay.files.seal(f"{url}/step-1")
    assert read(f"{url}/latest") == b"step-1"
    with pytest.raises(PermissionError, match="step-1/moved"):
        fs.mv(f"{url}/step-1/moved", f"{url}/step-1/again")


def test_a_folder_that_is_renamed_when_it_is_whole_is_of_the_step_of_its_new_name(url: str) -> None:
    """Write beside, then rename: what many tools do."""
    fs = fsspec.filesystem("backstay")
    write(f"{url}/checkpoint-7.tmp/sub/a", b"1")
    write(f"{url}/checkpoint-7.tmp/b", b"2")
    fs.mv(f"{url}/checkpoint-7.tmp", f"{url}/checkpoint-7", recursive=True)
    write(f"{url}/checkpoint-7/c", b"3")
    backstay.files.seal(f"{url}/checkpoint-7")
    assert backstay.files.begin(url) == 7
    assert [path.rpartition("checkpoint-7/")[2] for path in fs.find(url)] == ["b", "c", "sub/a"]
    with refuses(UsageError, "sealed", "step 7"):
        write(f"{url}/checkpoint-7/d", b"4")
    write(f"{url}/checkpoint-8.tmp/a", b"1")
    with refuses(UsageError, "sealed", "step 7"):
        fs.mv(f"{url}/checkpoint-8.tmp", f"{url}/checkpoint-6")


def test_a_folder_without_a_step_is_saved_again_and_has_nothing_of_what_it_was(url: str) -> None:
    """As DCP does with its overwrite, which deletes the .metadata that is there."""
    fs = fsspec.filesystem("backstay")
    for number in (1, 2):
        state = {"a": torch.full((10,), float(number)), "n": number}
        dcp.save(state, checkpoint_id=f"{url}/final")
        found = {"a": torch.zeros(10), "n": 0}
        dcp.load(found, checkpoint_id=f"{url}/final")
        assert (found["a"][0].item(), found["n"]) == (number, number)
    write(f"{url}/final/only", b"3")
    assert fs.find(f"{url}/final") == [f"{url}/final/only".removeprefix("backstay://")]
    with pytest.raises(FileNotFoundError):
        read(f"{url}/final/.metadata")
    assert backstay.files.begin(url) == 2, "the third one was not sealed"
    assert fs.exists(f"{url}/final/.metadata")


def test_a_folder_is_there_for_every_rank_when_the_save_returned(new_cluster: NewCluster, tmp_path: Path) -> None:
    cluster = new_cluster(2, 1, lease_s=1.0)
    do: list[list[Any]] = [["begin_files"], *(["save_files", step] for step in range(1, 7)), ["load_files", 6]]
    world = World(cluster, tmp_path, do, ranks=2).join()
    assert world.all("saved", "is_seen") == [[True] * 6] * 2
    assert world.all("loaded", "differing") == [[[]], [[]]]


DYING = """
import sys, fsspec, backstay.files
url = sys.argv[1]
print(backstay.files.begin(url), sorted(backstay.files.store_of(url).names()))
for step in range(int(sys.argv[2]), int(sys.argv[3]) + 1):
    for name in "ab":
        with fsspec.open(f"{url}/step-{step}/{name}", "wb") as file:
            file.write(b"1")
        if name == "a" and step == 3:
            raise RuntimeError("interrupted")
"""


def test_a_process_that_ends_by_an_exception_in_the_middle_of_a_folder_leaves_the_folder_before(url: str) -> None:
    def run(first: int, last: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", DYING, url, str(first), str(last)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    whole = run(1, 2)
    assert whole.returncode == 0, whole.stderr
    dying = run(3, 3)
    assert dying.stdout.strip() == "2 ['step-2/a', 'step-2/b']"
    assert "interrupted" in dying.stderr
    assert says("folder_given_up", dying.stderr, run=url.removeprefix("backstay://"))
    assert run(1, 0).stdout.strip() == "2 ['step-2/a', 'step-2/b']"


def test_the_scheme_is_declared_to_fsspec() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["fsspec.specs"] == {"backstay": "backstay.files:BackstayFileSystem"}


def _ranks(cluster: LocalCluster, run_id: str, world_id: str, size: int) -> list[FileStore]:
    """One store for each rank, all in this process."""
    stores = [FileStore(run_id=run_id, job="files", socket=str(cluster.nodes[0].socket)) for _ in range(size)]
    with ThreadPoolExecutor(size) as pool:
        begun = [
            pool.submit(store.begin, place=Place(rank=rank, size=size), world_id=world_id)
            for rank, store in enumerate(stores)
        ]
        assert len({future.result() for future in begun}) == 1
    return stores


def _close(stores: list[FileStore]) -> None:
    for store in stores:
        store.close()


def test_a_rank_that_wrote_nothing_commits_its_empty_part_and_reads_what_others_wrote(cluster: LocalCluster) -> None:
    stores = _ranks(cluster, "ranks", "w1", 3)
    stores[0].write(7, "all/of/it", b"from 0")
    stores[2].write(7, "other", b"from 2")
    stores[0].seal(7, timeout_s=30)
    _close(stores)
    for size in (3, 1, 2):
        stores = _ranks(cluster, "ranks", f"again-{size}", size)
        for store in stores:
            assert store.step == 7
            assert store.names() == {"all/of/it": 6, "other": 6}
            assert bytes(store.read("other")) == b"from 2"
        _close(stores)


def test_ranks_with_files_of_another_step_open_do_not_make_a_whole_one(cluster: LocalCluster) -> None:
    stores = _ranks(cluster, "mixed", "w1", 2)
    stores[0].write(1, "a", b"0")
    stores[0].seal(1, timeout_s=30)
    stores[1].write(2, "late", b"1")
    stores[0].write(3, "a", b"0")
    with refuses(UnavailableError, "incomplete", 3, 1):
        stores[0].seal(3, timeout_s=3)
    assert "step 2" in stores[1].last_problem
    _close(stores)
    stores = _ranks(cluster, "mixed", "w2", 2)
    assert stores[0].step == 1
    _close(stores)


def test_a_rank_killed_in_the_middle_of_a_folder_leaves_the_folder_before(
    new_cluster: NewCluster, tmp_path: Path
) -> None:
    """Two ranks, dcp.save and async_save by checkpoint_id alone; then one rank in another life reads what both wrote."""
    cluster = new_cluster(2, 1, lease_s=1.0)
    never = str(tmp_path / "never")
    do: list[list[Any]] = [["save_files", 1], ["async_save_files", 2], ["write_part", 3], ["await_file", never]]
    world = World(cluster, tmp_path, do, ranks=2)
    cluster.wait_until(lambda: all(world.lines(rank, "part") for rank in (0, 1)), 120, "both ranks to be in step 3")
    for process in world.processes:
        process.kill()
        process.wait(30)
    alone = World(cluster, tmp_path, [["begin_files"], ["load_files", 2]], ranks=1).join()
    assert alone.all("begun", "step") == [[2]]
    assert alone.all("loaded", "differing") == [[[]]]
