"""backstay.torchtitan with torchtitan's own containers, loader and file manager, on real daemons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import IterableDataset

from backstay.errors import IntegrityError, UsageError
from backstay.testing import LocalCluster
from tests.kit.documented import write_example
from tests.kit.loops import start_loop
from tests.kit.wording import refuses

pytest.importorskip("torchtitan")

pytestmark = pytest.mark.usefixtures("process_group")
CLUSTER = {"nodes": 1, "parity": 0, "lease_s": 1.0}
RANKS = 2


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


class Numbers(IterableDataset[torch.Tensor]):
    def __init__(self) -> None:
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.position += 1
            yield torch.full((8,), float(self.position % 13))

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Part(nn.Module):
    """What torchtitan's pipeline split leaves of a model: the layers of one stage under their names in the whole."""

    def __init__(self, layers: list[str]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in layers})
        self.register_buffer("freqs", torch.arange(4.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x).tanh()
        return x


class TrainState:
    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def titan(
    cluster: LocalCluster, folder: Path, run_id: str, *, parts: int = 1, dp: tuple[int, int] = (0, 1), **config: Any
) -> SimpleNamespace:
    """torchtitan's objects as its Trainer builds them, and our manager over them."""
    from torchtitan.components.dataloader import ParallelAwareDataloader
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw

    from backstay.torchtitan import BackstayCheckpointManager

    names = [str(i) for i in range(4)]
    model_parts = [Part(names[i * 4 // parts : (i + 1) * 4 // parts]) for i in range(parts)]
    settings = default_adamw(lr=1e-2)
    settings.implementation = "foreach"
    optimizers = settings.build(model_parts=model_parts)
    schedulers = LRSchedulersContainer.Config(warmup_steps=3).build(optimizers=optimizers, training_steps=100)
    loader = ParallelAwareDataloader(Numbers(), *dp, batch_size=2)
    state = TrainState()
    options = {"enable": True, "socket": str(cluster.nodes[0].socket), "restore_deadline_s": 60.0, **config}
    manager = BackstayCheckpointManager.Config(run_id=run_id, **options).build(
        dataloader=loader, model_parts=model_parts, optimizers=optimizers, lr_schedulers=schedulers,
        states={"train_state": state}, sd_adapter=None, base_folder=str(folder),
    )  # fmt: skip
    return SimpleNamespace(
        parts=model_parts, optimizers=optimizers, schedulers=schedulers, loader=loader, state=state, manager=manager
    )


def train(it: SimpleNamespace, until: int, *, last: int = -1) -> None:
    batches = iter(it.loader)
    while it.state.step < until:
        it.state.step += 1
        x = next(batches)
        for part in it.parts:
            x = part(x)
        x.square().mean().backward()
        it.manager.maybe_wait_for_staging()
        it.optimizers.step()
        it.schedulers.step()
        it.optimizers.zero_grad()
        it.manager.save(it.state.step, last_step=it.state.step == last)


def everything(it: SimpleNamespace) -> dict[str, Any]:
    """All state by name, as torchtitan itself would save it."""
    found = {name: tensor.clone() for part in it.parts for name, tensor in part.state_dict().items()}
    found |= {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in it.optimizers.state_dict().items()}
    return found | {"lr": it.schedulers.state_dict(), "train": it.state.state_dict(), "data": it.loader.state_dict()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    different = [
        name
        for name, value in expected.items()
        if not (torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value)
    ]
    assert not different


def settle(it: SimpleNamespace) -> None:
    """Until the last snapshot is committed, as the fence of a next step would have it."""
    it.manager.keeper.fence()
    assert it.manager.keeper.wait_committed()


def first_life(cluster: LocalCluster, folder: Path, run_id: str, steps: int, **config: Any) -> dict[str, Any]:
    """A run begins, trains and ends; all it had."""
    it = titan(cluster, folder, run_id, **config)
    assert not it.manager.load()
    train(it, steps)
    settle(it)
    found = everything(it)
    it.manager.close()
    return found


@pytest.mark.parametrize("parts", [1, 2])
def test_torchtitans_objects_come_back_from_memory_bit_for_bit(
    cluster: LocalCluster, tmp_path: Path, parts: int
) -> None:
    expected = first_life(cluster, tmp_path, f"parts-{parts}", 5, parts=parts, files=False)
    torch.manual_seed(1)
    second = titan(cluster, tmp_path, f"parts-{parts}", parts=parts, files=False)
    assert second.manager.load()
    assert_same(everything(second), expected)
    train(second, 7)
    second.manager.close()
    assert not list(tmp_path.rglob("*")), "files=False writes none"


def test_files_are_torchtitans_own_and_start_a_run_that_memory_never_heard_of(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    first = titan(cluster, tmp_path, "files-1", interval=4)
    assert not first.manager.load()
    train(first, 4)
    expected = everything(first)
    train(first, 6)
    first.manager.close()
    assert (tmp_path / "checkpoint" / "step-4" / ".metadata").exists()
    torch.manual_seed(2)
    second = titan(cluster, tmp_path, "files-2", interval=4)
    assert second.manager.load()
    assert_same(everything(second), expected)
    train(second, 6)
    second.manager.close()


def test_the_last_step_frees_the_runs_memory_when_files_have_it(cluster: LocalCluster, tmp_path: Path) -> None:
    first = titan(cluster, tmp_path, "ends", interval=100, last_save_model_only=False)
    first.manager.load()
    train(first, 3, last=3)
    expected = everything(first)
    first.manager.close()
    cluster.wait_until(
        lambda: not any("/ends/" in f"/{name}" and "rank-" in name for name in cluster.files(0)), 30, "its files to go"
    )
    second = titan(cluster, tmp_path, "ends-2", interval=100)
    assert second.manager.load()
    assert_same(everything(second), expected)
    second.manager.close()


def test_a_step_other_than_the_one_in_memory_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    first_life(cluster, tmp_path, "one-history", 3, interval=2)
    second = titan(cluster, tmp_path, "one-history", interval=2)
    with refuses(UsageError, "wrong_step", 2, 3, "default/one-history"):
        second.manager.load(2)
    second.manager.close()


def test_a_loader_that_is_cut_differently_is_refused_unless_it_is_excluded(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    first_life(cluster, tmp_path, "recut", 3, files=False)
    second = titan(cluster, tmp_path, "recut", files=False, dp=(1, 2))
    with refuses(IntegrityError, "wrong_extras", "rank 0 of 1", "rank 1 of 2"):
        second.manager.load()
    second.manager.close()
    third = titan(cluster, tmp_path, "recut", files=False, dp=(1, 2), exclude_from_loading=["dataloader"])
    assert third.manager.load()
    assert torch.equal(next(iter(third.loader))[0], torch.full((8,), 1.0)), "the data begins anew"
    assert third.state.step == 3
    third.manager.close()


def test_what_cannot_be_done_is_refused_by_name(cluster: LocalCluster, tmp_path: Path) -> None:
    with refuses(UsageError, "bad_name", "checkpoint.run_id"):
        titan(cluster, tmp_path, "")
    with refuses(UsageError, "unsupported_option", "exclude_from_loading", "optimizer"):
        titan(cluster, tmp_path, "refused", exclude_from_loading=["optimizer"])
    with refuses(UsageError, "bad_value", "snapshot_every", 0):
        titan(cluster, tmp_path, "refused", snapshot_every=0)


@pytest.mark.parametrize("option", ["load_only", "create_seed_checkpoint"])
def test_a_process_that_only_reads_or_seeds_files_is_not_the_run(
    cluster: LocalCluster, tmp_path: Path, option: str
) -> None:
    run_id = f"bystander-{option.replace('_', '-')}"
    first = titan(cluster, tmp_path, run_id, interval=2)
    first.manager.load()
    train(first, 2)
    other = titan(cluster, tmp_path, run_id, interval=2, **{option: True})
    assert other.manager.load()
    assert other.state.step == 2
    with refuses(UsageError, "memory_unused"):
        _ = other.manager.keeper
    other.manager.close()
    train(first, 4)
    settle(first)
    assert first.manager.keeper.stats().last_committed_step == 4, "the run itself was not disturbed"
    first.manager.close()


def test_a_killed_torchtitan_loop_goes_on_bit_for_bit(cluster: LocalCluster, tmp_path: Path) -> None:
    script = write_example("integrations/torchtitan.md", "titan_loop.py", tmp_path)
    env = {"RUN_ID": "killed", "DUMP": str(tmp_path)}
    killed = start_loop(cluster, script, "killed", STEPS="1000000", **env)
    cluster.wait_until(lambda: cluster.run_status("default/killed")["protected_step"] >= 5, 120, "five steps")
    killed.kill()
    reached = max(max(killed.digests(rank)) for rank in range(RANKS))
    last = str(reached + 5)
    again = start_loop(cluster, script, "again", STEPS=last, **env)
    assert again.wait_ended() == [0] * RANKS, cluster.evidence()
    control = start_loop(cluster, script, "control", STEPS=last, KEEP="0", **env)
    assert control.wait_ended() == [0] * RANKS, cluster.evidence()
    for rank in range(RANKS):
        loaded = again.loaded(rank)
        assert 5 <= loaded <= reached
        expected, found = control.digests(rank), again.digests(rank)
        assert sorted(found) == list(range(loaded + 1, reached + 6))
        assert found == {step: expected[step] for step in found}
