"""A checkpoint of others becomes the start of a run: imported by the command, restored bit for bit, trained on and kept."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict

from backstay.testing import LocalCluster
from tests.kit import layouts
from tests.kit.layout_ranks import digest
from tests.kit.layout_world import Layout, LayoutRanks
from tests.kit.light_world import wait_protected
from tests.kit.storage_world import cluster_with
from tests.kit.wording import says

SEED = 21
WORLDS: list[Layout] = [("plain", (1,)), ("fsdp", (2,))]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[LayoutRanks]:
    running = LayoutRanks(tmp_path / "ranks.log")
    yield running
    running.close()


def trained() -> layouts.Training:
    """What somebody else's run left behind."""
    torch.set_num_threads(1)
    training = layouts.build("plain", (1,), seed=SEED)
    for _ in range(3):
        training.step()
    return training


def hugging_face(training: layouts.Training, directory: Path) -> None:
    """Tied weights under the one name that the module does not come by first, as safe serialisation keeps them."""
    directory.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in training.model.state_dict().items()}
    del tensors["embed.weight"]
    save_file(tensors, directory / "model.safetensors")


def distributed(training: layouts.Training, directory: Path) -> None:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    dcp.save({"model": model, "optim": optimizer}, checkpoint_id=directory, no_dist=True)


def import_it(source: Path, storage: Path, run: str) -> None:
    command = [sys.executable, "-m", "backstayd.cli", "import", f"default/{run}", "--from", str(source)]
    command += ["--to", f"file://{storage}", "--step", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads((storage / f"default/{run}/attempt-0001/step-00000000/snapshot.json").read_text())
    assert {shard["layout"] for shard in record["shards"]} == {"imported"}, (
        "else it were taken for as many ranks' own shards"
    )


def digests(training: layouts.Training) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in layouts.gathered(training).items()}


def sockets(cluster: LocalCluster, count: int) -> list[str]:
    return [str(cluster.nodes[rank % len(cluster.nodes)].socket) for rank in range(count)]


@pytest.mark.parametrize("kind", ["huggingface", "dcp"])
def test_an_import_is_restored_bit_for_bit_in_any_layout_and_trains_on_with_snapshots(
    ranks: LayoutRanks, tmp_path: Path, kind: str
) -> None:
    theirs = trained()
    (hugging_face if kind == "huggingface" else distributed)(theirs, tmp_path / "theirs")
    storage = tmp_path / "storage"
    storage.mkdir()
    for layout in WORLDS:
        import_it(tmp_path / "theirs", storage, layout[0])
    if kind == "huggingface":
        theirs.optimizer = fresh_optimizer(theirs)
    expected = digests(theirs)
    loading = copy.deepcopy(theirs)
    for group in loading.optimizer.param_groups:
        group["lr"] = 0.7  # what a world that loads begins with; an import leaves hyper-parameters alone
    loading.step()
    following = digests(loading)
    theirs.step()
    theirs.step()
    after_two = digests(theirs)
    with cluster_with(f"file://{storage}", tmp_path, nodes=2, every_steps=0) as cluster:
        for layout in WORLDS:
            count = layout[1][0]
            answers = ranks.run("load", layout, layout[0], sockets(cluster, count), seed=99)
            check_loaded(answers, expected, following, kind)
            answers = ranks.run("save", layout, layout[0], sockets(cluster, count), seed=98)
            assert all(answer["state"] == after_two for answer in answers)
            wait_protected(cluster, f"default/{layout[0]}", 2)
            (answer,) = ranks.run("load", ("plain", (1,)), layout[0], sockets(cluster, 1), seed=97)
            assert (answer["outcome"], answer["step"], answer["state"]) == ("EXACT", 2, after_two)


def check_loaded(answers: list[dict[str, Any]], expected: dict[str, str], following: dict[str, str], kind: str) -> None:
    for rank, answer in enumerate(answers):
        assert (answer["outcome"], answer["step"]) == ("EXACT", 0), answer["message"]
        assert answer["state"] == expected
        assert answer["next"] == following, "it does not train on as theirs would"
        torch.manual_seed(99 + 50 + rank)
        assert answer["draws"][0] == torch.rand(1).item(), "the script's own generator"
        assert answer["cursor"]["rank"] == 77, "the script's own extras"
        assert answer["rng"] == "untouched"
        assert set(answer["extras"].values()) == {"untouched"}
        assert says("imported_model" if kind == "huggingface" else "imported_all", answer["message"]), answer["message"]


def fresh_optimizer(training: layouts.Training) -> torch.optim.Optimizer:
    """As the script makes it, for an import that brings no state."""
    groups = [
        {key: value for key, value in group.items() if key in ("params", "weight_decay")}
        for group in training.optimizer.param_groups
    ]
    return torch.optim.AdamW(groups, lr=0.05, amsgrad=True)
