"""What a first-time user gets wrong is refused at once, in one sentence that says what to give instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import backstay
from backstay.errors import UnavailableError, UsageError
from backstay.stores.file_store import FileStore
from tests.kit.local_daemon import LocalDaemon
from tests.kit.wording import refuses


class Stateful:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def make(**changed: Any) -> backstay.Snapshotter:
    model = nn.Linear(4, 4)
    given: dict[str, Any] = {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "run_id": "r"}
    return backstay.Snapshotter(**(given | changed))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"run_id": None}, "run_id None is not usable: 1 to 100 letters"),
        ({"run_id": 7}, "run_id 7 is not usable"),
        ({"run_id": "a/b"}, "run_id 'a/b' is not usable"),
        ({"job": None}, "job None is not usable"),
        ({"model": None}, "model is None: give the torch.nn.Module"),
        ({"model": nn.Linear(1, 1).state_dict()}, "model is a OrderedDict: give the torch.nn.Module"),
        ({"model": nn.Linear}, "model is the class Linear: give the torch.nn.Module"),
        ({"optimizer": None}, "optimizer is None: give a torch.optim.Optimizer"),
        ({"optimizer": torch.optim.AdamW}, "optimizer is the class AdamW"),
        ({"optimizer": nn.Linear(2, 2)}, "optimizer is a Linear"),
        ({"optimizer": []}, "no optimizer was given"),
        ({"optimizer": nn.Linear(2, 2).parameters()}, "optimizer 0 of 2 is a Parameter"),
        ({"optimizer": {"main": 1}}, "optimizer is a dict"),
        ({"extra": [Stateful()]}, "extra is a list: give names"),
        ({"extra": Stateful()}, "extra is a Stateful: give names"),
        ({"extra": {"step": 3}}, r"extra 'step' is a int \(3\): give an object with state_dict"),
        ({"extra": {"class": Stateful}}, "extra 'class' is the class Stateful: give an object"),
        ({"extra": {1: Stateful()}}, "extra 1 is not usable"),
        ({"socket": 7070}, r"socket is a int \(7070\): give the path"),
        ({"max_wait_s": "3"}, r"max_wait_s is a str \('3'\): give seconds"),
        ({"max_wait_s": None}, "max_wait_s is None: give seconds"),
        ({"max_wait_s": -1}, "max_wait_s is -1: give seconds, 0 or more"),
        ({"max_wait_s": math.nan}, "max_wait_s is nan"),
        ({"max_wait_s": math.inf}, "max_wait_s is inf: .*every wait has an end"),
        ({"check_every": 2.5}, r"check_every is a float \(2.5\): give a whole number"),
        ({"check_every": -1}, r"check_every is a int \(-1\)"),
    ],
)
def test_a_keeper_of_something_else_is_refused_with_what_to_give(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        make(**changed)
    assert "\n" not in str(caught.value)


def test_an_optimizer_is_given_once() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    with refuses(UsageError, "usage"):
        make(model=model, optimizer=[optimizer, optimizer])


def test_several_optimizers_may_come_in_any_collection() -> None:
    model = nn.Linear(4, 4)
    optimizers = [torch.optim.SGD([parameter]) for parameter in model.parameters()]
    make(model=model, optimizer=iter(optimizers)).close()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[backstay.Snapshotter]:
    with LocalDaemon() as daemon, make(socket=Path(daemon.socket_path)) as keeper:
        yield keeper


@pytest.mark.parametrize("deadline_s", ["10", None, -3, math.nan, math.inf, 1e12, True])
def test_a_deadline_that_is_none_is_refused_before_anything_is_asked(deadline_s: Any) -> None:
    keeper = make(socket="/nonexistent/socket")
    with refuses(UsageError, "bad_argument", "deadline_s"):
        keeper.restore(deadline_s=deadline_s)
    with refuses(UsageError, "bad_argument", "deadline_s"):
        FileStore(run_id="r", socket="/nonexistent/socket").begin(deadline_s=deadline_s)


def test_a_missing_daemon_is_named_with_what_to_start_or_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKSTAY_SOCKET", "/nonexistent/socket")
    with refuses(UnavailableError, "no_daemon", "nonexistent/socket"):
        make().restore(deadline_s=0.2)


@pytest.mark.parametrize("step", ["1", 1.5, 2.0, None, torch.tensor(1.0), 0, -5, 1 << 70])
def test_a_step_that_counts_no_steps_is_refused_and_the_next_is_captured(
    keeper: backstay.Snapshotter, step: Any
) -> None:
    keeper.restore()
    with refuses(UsageError, "bad_step") as caught:
        keeper.snapshot(step)
    assert caught.value.reason == "bad_step"
    assert keeper.snapshot(1).state == "started"
    keeper.fence()
    assert keeper.wait_committed()
    assert keeper.stats().last_committed_step == 1


@pytest.mark.parametrize("step", [np.int64(3), np.uint8(3), torch.tensor(3)])
def test_a_step_may_be_any_kind_of_integer(keeper: backstay.Snapshotter, step: Any) -> None:
    keeper.restore()
    status = keeper.snapshot(step)
    assert (type(status.step), status.step, status.state) == (int, 3, "started")
    keeper.fence()
    assert keeper.wait_committed()
    assert keeper.stats().last_committed_step == 3


def test_a_launched_process_without_a_process_group_is_told_to_make_one(
    keeper: backstay.Snapshotter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with refuses(UsageError, "no_process_group", 4, "init_process_group") as caught:
        keeper.restore()
    assert caught.value.reason == "no_process_group"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert keeper.restore().step == 0
