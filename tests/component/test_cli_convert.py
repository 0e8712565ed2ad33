"""`backstay import` and `backstay export` as an operator runs them, against durable storage on a local disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

from backstay import Snapshotter  # noqa: E402
from backstay.testing.cluster import LocalCluster  # noqa: E402


def backstay(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "backstayd.cli", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def a_model(directory: Path) -> dict[str, Any]:
    torch.manual_seed(5)
    tensors = {
        "layer.0.weight": torch.randn(300, 70),
        "layer.0.bias": torch.randn(300).bfloat16(),
        "scale": torch.tensor(2.0),
    }
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return tensors


def test_what_is_imported_is_exported_bit_for_bit(tmp_path: Path) -> None:
    tensors = a_model(tmp_path / "hf")
    (tmp_path / "storage").mkdir()
    storage = f"file://{tmp_path}/storage"
    done = backstay("import", "team/llm-1", "--from", str(tmp_path / "hf"), "--to", storage, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["format"], answer["step"], answer["tensors"]) == ("huggingface", 0, 3)
    assert (tmp_path / "storage/team/llm-1/attempt-0001/step-00000000/snapshot.json").is_file()
    done = backstay("export", "team/llm-1", "--from", storage, "--to", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "3 tensors" in done.stdout
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_directory_without_its_completion_record_is_no_snapshot(tmp_path: Path) -> None:
    a_model(tmp_path / "hf")
    (tmp_path / "storage").mkdir()
    storage = f"file://{tmp_path}/storage"
    assert backstay("import", "team/x", "--from", str(tmp_path / "hf"), "--to", storage, "--step", "7").returncode == 0
    (tmp_path / "storage/team/x/attempt-0001/step-00000007/snapshot.json").unlink()
    done = backstay("export", "team/x", "--from", storage, "--to", str(tmp_path / "out"))
    assert done.returncode == 66
    assert "no complete snapshot of team/x" in done.stderr


def test_a_byte_that_changed_on_disk_is_found(tmp_path: Path) -> None:
    a_model(tmp_path / "hf")
    (tmp_path / "storage").mkdir()
    storage = f"file://{tmp_path}/storage"
    assert backstay("import", "team/x", "--from", str(tmp_path / "hf"), "--to", storage).returncode == 0
    path = next((tmp_path / "storage").rglob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    done = backstay("export", "team/x", "--from", storage, "--to", str(tmp_path / "out"))
    assert done.returncode == 65, done.stderr
    assert "chunk" in done.stderr
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("arguments", "status", "problem"),
    [
        (["import", "team/x", "--from", "{hf}", "--to", "file://{tmp}/absent"], 69, "absent"),
        (["import", "team/x", "--from", "{tmp}/nothing", "--to", "file://{tmp}"], 64, "not a directory"),
        (["import", "team/x", "--from", "{hf}", "--to", "gopher://x/y"], 78, "scheme"),
        (["import", "nonsense", "--from", "{hf}", "--to", "file://{tmp}"], 64, "run_id"),
        (["export", "team/x", "--from", "file://{tmp}", "--to", "{tmp}/out"], 66, "no complete snapshot"),
        (["export", "team/x", "--to", "{tmp}/out", "--socket", "{tmp}/no.sock"], 69, "no daemon"),
        (["export", "team/x", "--to", "{tmp}/out", "--file-size", "huge"], 64, "huge"),
    ],
)
def test_what_cannot_be_done_is_said_in_words(tmp_path: Path, arguments: list[str], status: int, problem: str) -> None:
    a_model(tmp_path / "hf")
    filled = [text.format(tmp=tmp_path, hf=tmp_path / "hf") for text in arguments]
    done = backstay(*filled)
    assert done.returncode == status, done.stderr
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_twice_is_refused(tmp_path: Path) -> None:
    a_model(tmp_path / "hf")
    (tmp_path / "storage").mkdir()
    command = ("import", "team/x", "--from", str(tmp_path / "hf"), "--to", f"file://{tmp_path}/storage")
    assert backstay(*command).returncode == 0
    done = backstay(*command)
    assert done.returncode == 64
    assert "new run_id" in done.stderr


@pytest.mark.cluster
def test_a_run_in_memory_is_exported_through_any_node(tmp_path: Path) -> None:
    """From the node that trains, and from one that has no part in the run; the trainer goes on meanwhile."""
    torch.manual_seed(6)
    model = torch.nn.Sequential(torch.nn.Linear(64, 300), torch.nn.Linear(300, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    with LocalCluster(3, parity=1, lease_s=2.0) as cluster:
        with Snapshotter(model, optimizer, run_id="gpt", job="team", socket=str(cluster.nodes[0].socket)) as keeper:
            keeper.restore()
            for step in (1, 2):
                optimizer.zero_grad()
                model(torch.randn(4, 64)).sum().backward()
                optimizer.step()
                keeper.snapshot(step)
            keeper.fence()
            assert keeper.wait_committed()
            protected = lambda: cluster.run_status("team/gpt")["protected_step"] == 2  # noqa: E731
            cluster.wait_until(protected, 60, "step 2 to be protected")
            for index in (0, 2):
                target = tmp_path / f"from-{index}"
                done = backstay("export", "team/gpt", "--to", str(target), "--socket", str(cluster.nodes[index].socket))
                assert done.returncode == 0, done.stderr
                assert "at step 2" in done.stdout
                found = load_file(target / "model.safetensors")
                assert found.keys() == model.state_dict().keys()
                assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
        done = backstay("export", "team/other", "--to", str(tmp_path / "x"), "--socket", str(cluster.nodes[1].socket))
        assert done.returncode == 66, done.stderr
        assert "Traceback" not in done.stderr
