"""Restoring into another layout refuses what it cannot do exactly, by name and before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from backstay.capture import rank_state, shard_plan
from backstay.errors import IntegrityError
from backstay.format.shard import IMPORTED_KEY
from backstay.restore import load
from backstay.restore.rank_state import derived_streams
from backstay.restore.result import Loaded
from backstay.restore.snapshot import OpenedSnapshot
from backstay.trainer import local_tensors, optimizer_state
from backstay.trainer.data import followed_loaders
from tests.kit.stored import Stored, open_stored, whole
from tests.kit.wording import refuses

Rank = tuple[nn.Module, torch.optim.Optimizer]


def stage(*names: str, lr: float = 0.1, seed: int = 1, steps: int = 2, width: int = 4) -> Rank:
    """A part of a model with these layers, trained."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({name: nn.Linear(width, 3) for name in names})
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5
        optimizer.step()
    return model, optimizer


def snapshot_of(
    directory: Path, ranks: Sequence[Rank], extras: Sequence[Mapping[str, Any]] | None = None
) -> OpenedSnapshot:
    """What these ranks' keepers would have written, each without a process group."""
    stored: list[dict[str, Stored]] = []
    headers = []
    for rank, (model, optimizer) in enumerate(ranks):
        holdings = local_tensors.collect(model, [optimizer], rank=rank)
        found = rank_state.read([optimizer], extras[rank] if extras else {}, holdings, rank=rank)
        tensors = {
            t.name: (box, offsets, t.global_shape)
            for t, box, offsets in shard_plan.own_boxes(holdings.tensors, rank=rank)
        }
        tensors |= {name: whole(tensor) for name, tensor in found.tensors.items()}
        document = torch.tensor(list(found.document), dtype=torch.uint8)
        stored.append({**tensors, f"rank-{rank:05d}.state.json": whole(document)})
        headers.append({optimizer_state.METADATA_KEY: optimizer_state.describe([optimizer], holdings)})
    return open_stored(directory, stored, metadata=headers)[0]


def restore(
    opened: OpenedSnapshot, here: Rank, *, rank: int = 0, world_size: int = 1, extra: Mapping[str, Any] | None = None
) -> Loaded:
    """Load into one rank of a world."""
    holdings = local_tensors.collect(here[0], [here[1]], rank=rank)
    target = load.Target(
        model=here[0], optimizers=[here[1]], extra=extra or {}, rank=rank, world_size=world_size, run="default/r",
        signature=local_tensors.model_signature(holdings),
    )  # fmt: skip
    with opened:
        return load.prepare(target, opened).load()


def refused(opened: OpenedSnapshot, here: Rank, **arguments: Any) -> IntegrityError:
    """Restore, expecting a refusal that left everything as it was."""
    before = [p.detach().clone() for p in here[0].parameters()]
    generator = torch.get_rng_state()
    with pytest.raises(IntegrityError, match="nothing was loaded") as caught:
        restore(opened, here, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, here[0].parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    return caught.value


def test_stages_of_two_ranks_come_together_in_one(tmp_path: Path) -> None:
    one, two = stage("a", "b"), stage("c", seed=2)
    here = stage("a", "b", "c", seed=3, steps=0, lr=0.9)
    loaded = restore(snapshot_of(tmp_path, [one, two]), here)
    layers = here[0]
    for model, optimizer in (one, two):
        for name, layer in model.named_children():
            assert torch.equal(layers[name].weight, layer.weight)
            for key, value in optimizer.state[layer.weight].items():
                assert torch.equal(here[1].state[layers[name].weight][key], value)
    assert here[1].param_groups[0]["lr"] == 0.1
    assert loaded.result.is_resharded


def test_complaint_3_a_conversion_never_starts_from_scratch_in_silence(tmp_path: Path) -> None:
    """Renamed, missing, of another dtype or another shape: refused with what is where, never skipped."""
    cases: list[tuple[tuple[object, ...], Rank]] = [
        (("model.b.bias", "model.b.weight"), stage("a", steps=0)),
        (("model.x.bias", "model.x.weight"), stage("a", "b", "x", steps=0)),
        (("model.a.weight", (3, 4), "torch.float32", (3, 5)), stage("a", "b", steps=0, width=5)),
    ]
    for index, (facts, here) in enumerate(cases):
        (tmp_path / str(index)).mkdir()
        opened = snapshot_of(tmp_path / str(index), [stage("a"), stage("b")])
        with refuses(IntegrityError, "wrong_model", *facts, "run_id"):
            raise refused(opened, here)
    half = stage("a", "b", steps=0)
    half[0].to(torch.bfloat16)
    assert "torch.bfloat16 here" in str(refused(snapshot_of(tmp_path, [stage("a"), stage("b")]), half))


def test_optimizer_state_is_never_left_out(tmp_path: Path) -> None:
    """A parameter that was in no optimizer, or whose state was made for one rank's part, is refused by name."""
    model, _ = stage("a", "b")
    trained_in_part = model, torch.optim.AdamW(model["a"].parameters())
    error = refused(snapshot_of(tmp_path, [trained_in_part, stage("c")]), stage("a", "b", "c", steps=0))
    assert error.reason == "wrong_parameters"
    assert "unexpected ['b.bias', 'b.weight']" in str(error)
    own = [stage("a", seed=1), stage("a", seed=1)]
    for rank, (module, optimizer) in enumerate(own):
        optimizer.state[module["a"].weight]["memory"] = torch.full((4 + rank,), 1.0)
    error = refused(snapshot_of(tmp_path, own), stage("a", steps=0))
    assert error.reason == "state_not_mappable"
    assert "'memory' of shapes [(4,), (5,)]" in str(error)


def test_copies_with_the_same_bytes_are_one_and_others_are_refused_with_their_ranks(tmp_path: Path) -> None:
    same = [stage("a"), stage("a"), stage("a")]
    here = stage("a", seed=5, steps=0)
    restore(snapshot_of(tmp_path, same), here)
    assert torch.equal(here[0]["a"].weight, same[0][0]["a"].weight)
    error = refused(snapshot_of(tmp_path, [stage("a"), stage("a", seed=2)]), stage("a", seed=5, steps=0))
    assert error.reason == "ranks_differ"
    assert "a.weight differs between ranks 0, 1" in str(error) or "a.bias differs between ranks 0, 1" in str(error)


def test_hyper_parameters_on_which_ranks_disagree_are_refused_with_both_values(tmp_path: Path) -> None:
    opened = snapshot_of(tmp_path, [stage("a", lr=0.1), stage("b", lr=0.2)])
    error = refused(opened, stage("a", "b", steps=0))
    assert error.reason == "ranks_disagree"
    assert "group 0: lr is 0.1 on rank 0 of the snapshot, 0.2 on rank 1" in str(error)


def test_tensors_that_are_tied_here_and_differ_there_are_refused(tmp_path: Path) -> None:
    here = stage("a", "b", steps=0)
    here[0]["b"].weight = here[0]["a"].weight
    tied = here[0], torch.optim.AdamW(here[0].parameters())
    assert "are one tensor here, two in the snapshot" in str(
        refused(snapshot_of(tmp_path, [stage("a", "b"), stage("c")]), tied)
    )


def test_an_imported_snapshot_brings_the_model_alone(tmp_path: Path) -> None:
    value = stage("a")[0]
    tensors = {f"model.{name}": whole(p) for name, p in value.named_parameters()}
    opened = open_stored(tmp_path, [tensors], metadata={IMPORTED_KEY: "hf"})[0]
    here = stage("a", seed=4, steps=0)
    drawn = torch.get_rng_state()
    loaded = restore(opened, here)
    assert torch.equal(here[0]["a"].weight, value["a"].weight)
    assert not here[1].state
    assert torch.equal(torch.get_rng_state(), drawn)
    assert loaded.result.rng == "untouched"
    assert loaded.result.message == "imported: model loaded, optimizer fresh, generators and extras untouched"


def test_streams_beyond_the_snapshots_are_derived_and_never_shared(tmp_path: Path) -> None:
    states = set()
    for rank in range(2, 6):
        loaded = restore(
            snapshot_of(tmp_path, [stage("a"), stage("a")]), stage("a", seed=5, steps=0), rank=rank, world_size=6
        )
        assert f"derived from the snapshot and rank {rank}" in loaded.result.rng
        drawn = torch.rand(1).item()
        states.add(drawn)
        restore(snapshot_of(tmp_path, [stage("a"), stage("a")]), stage("a", steps=0), rank=rank, world_size=6)
        assert torch.rand(1).item() == drawn, "the same each time"
    assert len(states) == 4
    assert derived_streams("s", 7, has_cuda=False)[0]["python"] != derived_streams("t", 7, has_cuda=False)[0]["python"]


class Shared:
    """A loader's position that any number of ranks can divide."""

    def __init__(self, loader: StatefulDataLoader[Any]) -> None:
        self.loader = loader
        self.given: list[Any] = []

    def state_dict(self) -> dict[str, Any]:
        return dict(self.loader.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)

    def load_state_dicts(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
        self.given = [json.dumps(state["_num_yielded"]) for state in states]
        self.loader.load_state_dict(states[rank % len(states)])


def loader_at(position: int, seed: int) -> tuple[StatefulDataLoader[Any], Any]:
    torch.manual_seed(seed)
    loader: StatefulDataLoader[Any] = StatefulDataLoader(list(range(40)), batch_size=2, shuffle=True, num_workers=0)
    batches = iter(loader)
    for _ in range(position):
        next(batches)
    return loader, batches


def test_a_stateful_data_loader_goes_on_exactly_with_the_same_ranks_and_is_asked_with_others(tmp_path: Path) -> None:
    pairs = [loader_at(3, 1), loader_at(5, 2)]
    opened = snapshot_of(tmp_path, [stage("a"), stage("a")], [{"loader": loader} for loader, _ in pairs])
    expected = [batch.tolist() for batch in pairs[1][1]]
    fresh, _ = loader_at(0, 9)
    loaded = restore(opened, stage("a", seed=4, steps=0), rank=1, world_size=2, extra={"loader": fresh})
    assert [batch.tolist() for batch in fresh] == expected
    assert loaded.cursors == {"loader": 1}
    pairs = [loader_at(3, 1), loader_at(5, 2)]
    opened = snapshot_of(tmp_path, [stage("a"), stage("a")], [{"loader": loader} for loader, _ in pairs])
    shared = Shared(loader_at(0, 9)[0])
    loaded = restore(opened, stage("a", seed=4, steps=0), rank=0, world_size=3, extra={"loader": shared})
    assert shared.given == ["3", "5"]
    assert loaded.result.extras == {"loader": "its load_state_dicts() got the states of all 2 ranks"}
    assert loaded.cursors == {}


def distributed_loader(rank: int, world_size: int) -> DataLoader[Any]:
    sampler: Any = DistributedSampler(range(48), num_replicas=world_size, rank=rank, seed=5)
    return DataLoader(list(range(48)), batch_size=2, sampler=sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_loaders_of_another_number_of_ranks_go_on_where_the_old_ones_were_together(
    tmp_path: Path, world_size: int
) -> None:
    """No sample is left out and none is trained twice, where the ranks divide what was used without a rest."""
    old = [distributed_loader(rank, 2) for rank in range(2)]
    extras = [followed_loaders.follow_all({"loader": loader}) for loader in old]
    passes = [iter(loader) for loader in old]
    used = [sample for batches in passes for _ in range(6) for sample in next(batches).tolist()]
    found = list(used)
    for rank in range(world_size):
        directory = tmp_path / str(rank)
        directory.mkdir()
        loader = distributed_loader(rank, world_size)
        loaded = restore(
            snapshot_of(directory, [stage("a"), stage("a")], extras), stage("a", seed=4, steps=0), rank=rank,
            world_size=world_size, extra=followed_loaders.follow_all({"loader": loader}),
        )  # fmt: skip
        assert loaded.result.extras == {"loader": f"state of rank {rank % 2} of 2, scaled to its length"}
        found += [sample for batch in loader for sample in batch.tolist()]
    assert sorted(found) == list(range(48))
