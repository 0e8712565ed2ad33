"""Frozen tensors are left alone in their slots, and whatever changes them, by any route, nothing stale is ever kept."""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import backstay
from backstay.capture import cuda_copy, shard_plan
from backstay.capture.unchanged import RESTLESS, STEADY, Tracker
from backstay.format import json_records
from backstay.format.digest import read_tensor, verify_chunks
from backstay.format.manifest import Manifest
from backstay.trainer import local_tensors
from tests.kit.local_daemon import LocalDaemon

WIDE = 700_001  # float32 elements: ten whole chunks, and no multiple of anything


class Model(nn.Module):
    """A small trainable head over frozen memory of every kind there is on a CPU."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        (directory / "weights").write_bytes(random.Random(1).randbytes(4 * WIDE))
        mapped = torch.from_file(str(directory / "weights"), shared=False, size=WIDE, dtype=torch.float32)
        made = {
            "ordinary": torch.rand(WIDE, generator=generator),
            "matrix": torch.rand(512, 512, generator=generator),
            "sixteen": torch.rand(WIDE, generator=generator).bfloat16(),
            "small": torch.rand(900, generator=generator),
            "tiny": torch.rand(3, generator=generator),
            "scalar": torch.rand((), generator=generator),
            "shared": torch.rand(WIDE, generator=generator).share_memory_(),
            "mapped": mapped,
            "turned": torch.rand(300, 200, generator=generator).t(),
        }
        self.frozen = nn.ParameterDict({name: nn.Parameter(t, requires_grad=False) for name, t in made.items()})
        self.head = nn.Linear(20, 10)


class Run:
    """A run whose every snapshot is compared with the living model, byte for byte."""

    def __init__(self, daemon: LocalDaemon, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> None:
        self.daemon, self.model, self.optimizer = daemon, model, optimizer
        self.step = 0
        self.keeper = backstay.Snapshotter(
            model, optimizer, run_id="r", socket=daemon.socket_path, max_wait_s=10.0, **options
        )
        self.keeper.restore()

    def train(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 0.25) if parameter.requires_grad else None
        self.optimizer.step()
        self.optimizer.zero_grad()

    def snapshot(self) -> int:
        """Take one, compare all of it; returns how many bytes the slot held already."""
        self.train()
        before = self.keeper.stats()
        self.step += 1
        self.keeper.snapshot(self.step)
        self.keeper.fence()
        assert self.keeper.wait_committed(20.0)
        assert self.daemon.committed_steps("default/r")[-1] == self.step, self.keeper.stats()
        self.compare()
        return self.keeper.stats().kept_bytes - before.kept_bytes

    def settle(self) -> int:
        """Snapshots until both slots hold what does not change."""
        return [self.snapshot() for _ in range(5)][-1]

    def compare(self) -> None:
        shard = self.daemon.shard("default/r", self.step)
        with safe_open(str(shard.path), framework="pt") as file:
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                left, right = file.get_tensor(f"model.{name}"), parameter.detach()
                assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right))), name
        manifest = json_records.from_json(Manifest, shard.manifest)
        manifest.check()
        check_digests(shard.path, manifest)


def check_digests(path: Path, manifest: Manifest) -> None:
    """Every chunk and tensor digest of the file."""
    verify_chunks(path.read_bytes(), manifest, 0)
    with path.open("rb") as file:
        for tensor in manifest.tensors:
            read_tensor(file.fileno(), manifest, tensor.name)


@pytest.fixture
def daemon() -> Iterator[LocalDaemon]:
    with LocalDaemon() as found:
        yield found


@pytest.fixture
def model() -> Iterator[Model]:
    with tempfile.TemporaryDirectory() as directory:
        yield Model(Path(directory))


def adam(model: Model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.head.parameters(), fused=True)


def test_frozen_tensors_are_copied_once_per_slot(daemon: LocalDaemon, model: Model) -> None:
    run = Run(daemon, model, adam(model), check_every=0)
    try:
        kept = run.settle()
        frozen = sum(p.nbytes for name, p in model.frozen.items() if name != "turned")
        assert kept > 0.9 * frozen
        before = run.keeper.stats()
        run.snapshot()
        after = run.keeper.stats()
        trained = sum(p.nbytes for p in model.head.parameters()) * 3
        state = 64 * 1024  # JSON state and generators
        assert after.copied_bytes - before.copied_bytes < trained + model.frozen["turned"].nbytes + state
    finally:
        run.keeper.close()


def through_pointer(t: torch.Tensor, at: int) -> None:
    ctypes.memset(t.data_ptr() + at * t.element_size(), random.randrange(1, 255), t.element_size())


def through_readv(t: torch.Tensor, at: int) -> None:
    """The kernel writes."""
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(t.element_size()))
        file.flush()
        view = (ctypes.c_char * t.element_size()).from_address(t.data_ptr() + at * t.element_size())
        assert os.preadv(file.fileno(), [view], 0) == t.element_size()


def through_numpy(t: torch.Tensor, at: int) -> None:
    alias = t if t.dtype != torch.bfloat16 else t.view(torch.int16)
    array = alias.detach().numpy().reshape(-1)
    array[at] = np.random.default_rng().integers(1, 100)


def through_thread(t: torch.Tensor, at: int) -> None:
    thread = threading.Thread(target=lambda: t.data.view(-1)[at].mul_(1.5).add_(1))
    thread.start()
    thread.join()


def through_child(t: torch.Tensor, at: int) -> None:
    """A forked child's writes do not count, those of the parent after it do."""
    child = os.fork()
    if child == 0:
        ctypes.memset(t.data_ptr(), 0, t.nbytes)
        os._exit(0)
    os.waitpid(child, 0)
    through_pointer(t, at)


def through_no_grad(t: torch.Tensor, at: int) -> None:
    with torch.no_grad():
        t.view(-1)[at] += 1


ROUTES: list[Callable[[torch.Tensor, int], None]] = [
    lambda t, at: t.data.view(-1)[at].fill_(random.random()),
    lambda t, _: t.data.mul_(1.25).add_(1),
    lambda t, _: t.data.copy_(torch.rand_like(t)),
    lambda t, _: t.detach().zero_(),
    lambda t, _: nn.init.normal_(t),
    through_pointer, through_readv, through_numpy, through_thread, through_child, through_no_grad,
]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_whatever_writes_to_frozen_memory_by_any_route_the_next_snapshot_has_it(
    daemon: LocalDaemon, model: Model, seed: int
) -> None:
    chance = random.Random(seed)
    run = Run(daemon, model, adam(model), check_every=0)
    try:
        run.settle()
        kept = 0
        for _ in range(25):
            for _ in range(chance.randrange(3)):
                name = chance.choice(sorted(model.frozen))
                tensor = model.frozen[name]
                if name == "turned":
                    tensor.data.add_(1)
                    continue
                at = chance.choice([0, tensor.numel() - 1, chance.randrange(tensor.numel())])
                chance.choice(ROUTES)(tensor, at)
            kept += run.snapshot()
        assert kept > 0, "nothing was ever kept: the test shows nothing"
        assert run.settle() > 0
    finally:
        run.keeper.close()


def test_loading_another_state_into_frozen_memory_is_seen(daemon: LocalDaemon, model: Model) -> None:
    run = Run(daemon, model, adam(model), check_every=0)
    try:
        run.settle()
        model.load_state_dict({name: torch.rand(t.shape).to(t.dtype) for name, t in model.state_dict().items()})
        run.snapshot()
        model.frozen["ordinary"].data = torch.rand(WIDE)
        run.snapshot()
        model.frozen["ordinary"] = nn.Parameter(torch.rand(WIDE), requires_grad=False)
        run.snapshot()
        assert run.settle() > 0
    finally:
        run.keeper.close()


@pytest.mark.parametrize("is_fused", [True, False])
def test_an_unfreezing_in_mid_run_keeps_nothing_stale(daemon: LocalDaemon, model: Model, is_fused: bool) -> None:
    optimizer = torch.optim.AdamW(model.head.parameters(), fused=is_fused)
    run = Run(daemon, model, optimizer, check_every=0)
    try:
        assert run.settle() > 0
        thawed = model.frozen["ordinary"]
        version = thawed._version
        thawed.requires_grad_(True)
        run.snapshot()
        optimizer.add_param_group({"params": [thawed]})
        for _ in range(4):
            run.snapshot()
        if is_fused:
            assert thawed._version == version, "a counter would have missed these steps"
        thawed.requires_grad_(False)  # frozen again, but still in its group: weight decay may change it at any step
        for _ in range(4):
            run.snapshot()
        del optimizer.param_groups[-1], optimizer.state[thawed]
        assert run.settle() > 4 * 256 * 1024
    finally:
        run.keeper.close()


def test_what_is_frozen_in_mid_run_is_kept_soon_and_never_stale(daemon: LocalDaemon, model: Model) -> None:
    late = model.frozen["ordinary"]
    late.requires_grad_(True)  # trained by something that is not the keeper's
    run = Run(daemon, model, adam(model), check_every=0)
    try:
        before = run.settle()
        late.requires_grad_(False)
        late.data.add_(1.0)
        for _ in range(STEADY - 1):
            assert run.snapshot() <= before
        assert run.snapshot() == 0, "a new plan, and whole snapshots after it"
        late.data.add_(1.0)
        assert run.settle() > before + 4 * WIDE // 2
        late.data.add_(1.0)  # after it is kept, too
        run.snapshot()
        late.requires_grad_(True)
        late.data.add_(1.0)
        run.snapshot()
    finally:
        run.keeper.close()


def test_freezing_and_thawing_by_turns_makes_no_new_plan_each_time(daemon: LocalDaemon, model: Model) -> None:
    late = model.frozen["ordinary"]
    late.requires_grad_(True)
    run = Run(daemon, model, adam(model), check_every=0)
    try:
        before = run.settle()
        for turn in range(2 * STEADY):
            late.requires_grad_(bool(turn % 2))
            late.data.add_(1.0)
            assert run.snapshot() == before
    finally:
        run.keeper.close()


def test_a_trained_part_of_many_chunks_is_copied_beside_what_is_kept(daemon: LocalDaemon, model: Model) -> None:
    model.head = nn.Linear(1000, 700)  # ten chunks, copied while the rest is looked at
    run = Run(daemon, model, adam(model), check_every=0)
    try:
        kept = run.settle()
        assert kept > 0
        for _ in range(4):
            before = run.keeper.stats()
            assert run.snapshot() == kept
            after = run.keeper.stats()
            assert (
                after.hashed_bytes - before.hashed_bytes + kept
                == daemon.shard("default/r", run.step).path.stat().st_size
            )
        model.frozen["ordinary"].data[WIDE // 2] += 1.0
        assert run.snapshot() < kept
    finally:
        run.keeper.close()


def test_a_tensor_that_always_changes_is_watched_no_longer(daemon: LocalDaemon, model: Model) -> None:
    """An EMA teacher: frozen by all signs, and updated each step."""
    run = Run(daemon, model, adam(model), check_every=0)
    try:
        for _ in range(10):
            model.frozen["ordinary"].data.mul_(0.99)
            run.snapshot()
        model.frozen["ordinary"].data.mul_(0.99)
        run.snapshot()
    finally:
        run.keeper.close()


def test_what_ddp_does_not_keep_the_same_and_changes_is_said(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    found = local_tensors.collect(model, [], rank=0)
    shared = tuple(dataclasses.replace(tensor, replicas=(0, 1)) for tensor in found.tensors)  # as under DDP
    holdings = dataclasses.replace(found, tensors=shared)
    made = shard_plan.build(holdings, rank=0, dynamic={}, state=b"{}", metadata={})
    tracker = Tracker()
    for step in range(2 * RESTLESS):
        tracker.look(made, step, lambda _: [])
        assert not caplog.records or step >= RESTLESS - 1
        model.frozen["ordinary"].data.mul_(0.99)
    tracker.close()
    (said,) = caplog.messages
    assert "model.frozen.ordinary needs no gradient" in said
    assert "(1 tensors in all)" in said


def test_a_run_that_is_restored_begins_with_whole_snapshots(daemon: LocalDaemon, model: Model) -> None:
    run = Run(daemon, model, adam(model), check_every=0)
    run.settle()
    assert run.keeper.restore().step == run.step
    assert run.snapshot() == 0
    assert run.settle() > 0
    run.keeper.close()


def test_a_daemon_that_comes_back_gets_whole_snapshots_again(daemon: LocalDaemon, model: Model) -> None:
    run = Run(daemon, model, adam(model), check_every=0)
    try:
        run.settle()
        daemon.kill()
        daemon.start()
        for _ in range(200):
            run.train()
            run.step += 1
            run.keeper.snapshot(run.step)
            run.keeper.fence()
            run.keeper.wait_committed(20.0)
            if run.keeper.stats().last_committed_step == run.step:
                break
            daemon.wait_until(lambda: False, 0.05)
        run.compare()
        assert run.settle() > 0
    finally:
        run.keeper.close()


def test_a_kept_tensor_that_was_wrong_after_all_ends_the_keeping(
    daemon: LocalDaemon, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes of a free slot flip: what a device or a bug could do behind the kernel's back, seen from the other side."""
    run = Run(daemon, model, adam(model), check_every=1)
    try:
        run.settle()
        for path in set(daemon.directory.glob("slot-*")) - {daemon.shard("default/r", run.step).path}:
            with path.open("r+b") as file:
                file.seek(1_000_000)
                file.write(os.urandom(64))
        run.train()
        run.step += 1
        with caplog.at_level(logging.ERROR, logger="backstay"):
            run.keeper.snapshot(run.step)
            run.keeper.fence()
            run.keeper.wait_committed(20.0)
        assert run.step not in daemon.committed_steps("default/r")
        assert "was to be unchanged" in caplog.text
        assert run.snapshot() == 0
        assert run.snapshot() == 0
    finally:
        run.keeper.close()


def test_manifests_say_since_when_chunks_are_unchanged(daemon: LocalDaemon, model: Model) -> None:
    run = Run(daemon, model, adam(model), check_every=0)
    try:
        run.settle()
        stated = json_records.from_json(Manifest, daemon.shard("default/r", run.step).manifest).unchanged
        assert sum(one.chunk_count for one in stated) > 20
        assert {one.since_step for one in stated} == {2}, "the second look found all as the first had left it"
        model.frozen["matrix"].data[7, 7] = 3.0
        run.snapshot()
        changed = json_records.from_json(Manifest, daemon.shard("default/r", run.step).manifest)
        entry = next(t for t in changed.tensors if t.name == "model.frozen.matrix")
        for one in changed.unchanged:
            begin, end = (
                one.first_chunk * changed.chunk_bytes,
                (one.first_chunk + one.chunk_count) * changed.chunk_bytes,
            )
            assert end <= entry.begin or begin >= entry.end
    finally:
        run.keeper.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_the_device_checksum_sees_every_small_change(dtype: torch.dtype) -> None:
    weights = cuda_copy.make_weights(torch.device("cpu"), 1000)
    chance = random.Random(3)
    for count in (1, 2, 3, 5, 999, 4001, 9973):
        tensor = torch.randint(0, 100, (count + 1,)).to(dtype)[1:]
        former = int(cuda_copy.checksum(tensor, weights))
        assert int(cuda_copy.checksum(tensor.clone(), weights)) == former
        for _ in range(50):
            changed = tensor.clone()
            raw = changed.view(torch.uint8)
            for _ in range(chance.choice([1, 1, 2, 5])):
                raw[chance.randrange(raw.numel())] ^= 1 << chance.randrange(8)
            if not torch.equal(raw, tensor.clone().view(torch.uint8)):
                assert int(cuda_copy.checksum(changed, weights)) != former
    rows = torch.arange(8000, dtype=torch.int32).reshape(8, 1000)
    assert int(cuda_copy.checksum(rows, weights)) != int(cuda_copy.checksum(rows.flip(0), weights))
    assert int(cuda_copy.checksum(-rows, weights)) != int(cuda_copy.checksum(rows, weights))
