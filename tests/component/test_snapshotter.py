"""The keeper in a training loop: fences, schedules, several optimizers, and daemons that die, freeze or refuse."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import backstay
from backstay.capture.overhead import LIMIT
from backstay.errors import UsageError
from backstay.protocol import messages
from tests.kit.local_daemon import LocalDaemon
from tests.kit.wording import refuses

Loop = Callable[..., Any]


@pytest.fixture
def daemon() -> Iterator[LocalDaemon]:
    with LocalDaemon() as running:
        yield running


class Training:
    """A small model and its loop."""

    def __init__(self, socket: str, *, run_id: str = "r", fused: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(20, 40), nn.BatchNorm1d(40), nn.Dropout(0.1), nn.Linear(40, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=fused)
        self.keeper = backstay.Snapshotter(self.model, self.optimizer, run_id=run_id, socket=socket, **options)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.rand(8, 20)).sum().backward()
        self.optimizer.step()

    def run(self, first: int, last: int) -> list[backstay.SnapshotStatus]:
        statuses = []
        for step in range(first, last):
            self.step()
            statuses.append(self.keeper.snapshot(step + 1))
        return statuses


def poll(condition: Callable[[], bool], why: str, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    gate = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, why
        gate.wait(0.01)


def test_every_step_is_committed_and_the_newest_is_kept(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path)
    assert training.keeper.restore().outcome == "NONE"
    assert {status.state for status in training.run(0, 12)} == {"started"}
    training.keeper.fence()
    assert training.keeper.wait_committed()
    assert training.keeper.stats().committed == 12
    assert daemon.committed_steps("default/r") == [12]
    training.keeper.finish()
    assert daemon.runs["default/r"].finished == {0}


def test_waiting_for_a_commit_does_not_wait_for_the_slot_of_the_next_one(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path)
    training.keeper.restore()
    training.run(0, 3)
    training.keeper.fence()
    assert training.keeper._capturer is not None
    background = training.keeper._capturer.background
    assert background.drain(20)  # the slot of step 4 is reserved
    daemon.unanswered = (messages.Reserve,)
    training.run(3, 4)
    assert training.keeper.wait_committed(20)
    assert daemon.committed_steps("default/r") == [4]
    poll(lambda: not background.drain(0), "the slot of step 5 is asked for, and not given")
    daemon.unanswered = ()
    training.keeper.close()


def test_snapshot_before_restore_and_steps_that_do_not_increase_are_usage_errors(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path)
    with refuses(UsageError, "not_restored"):
        training.keeper.snapshot(1)
    training.keeper.restore()
    training.run(0, 2)
    with refuses(UsageError, "step_not_increasing", 2):
        training.keeper.snapshot(2)
    training.keeper.close()
    with pytest.raises(UsageError, match="closed"):
        training.keeper.snapshot(3)


def test_a_snapshot_without_an_optimizer_step_is_refused(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path)
    training.keeper.restore()
    training.run(0, 1)
    status = training.keeper.snapshot(2)
    assert (status.state, status.reason) == ("refused", "no optimizer step since snapshot(1)")
    training.step()
    assert training.keeper.snapshot(3).state == "started"
    training.keeper.close()


def test_a_keeper_whose_optimizer_trains_no_longer_says_so(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(daemon.socket_path)
    training.keeper.restore()
    training.run(0, 1)
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    with caplog.at_level(logging.WARNING, logger="backstay"):
        assert {status.state for status in training.run(1, 100)} == {"refused"}
        assert not caplog.records
        training.run(100, 105)
    (said,) = caplog.messages
    assert "snapshot(101) is not taken: no optimizer step since snapshot(1)" in said
    training.keeper.close()


def test_a_snapshot_taken_in_inference_mode_spoils_none_after_it(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path)
    training.keeper.restore()
    training.step()
    with torch.inference_mode():
        assert training.keeper.snapshot(1).state == "started"
    assert {status.state for status in training.run(1, 4)} == {"started"}
    training.keeper.close()


def test_only_scheduled_steps_are_captured(daemon: LocalDaemon) -> None:
    daemon.interval_steps = 3
    training = Training(daemon.socket_path)
    training.keeper.restore()
    states = [status.state for status in training.run(0, 6)]
    assert states == ["not_scheduled", "not_scheduled", "started"] * 2
    training.keeper.fence()
    assert training.keeper.wait_committed()
    assert daemon.committed_steps("default/r") == [6]
    training.keeper.close()


def test_the_fence_runs_before_hooks_that_were_there_first(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path)
    order = []
    training.optimizer.register_step_pre_hook(lambda *_: order.append("user"))
    other = backstay.Snapshotter(training.model, training.optimizer, run_id="second", socket=daemon.socket_path)
    first = next(iter(training.optimizer._optimizer_step_pre_hooks.values()))
    assert "_before_step" in repr(first)
    training.step()
    assert order == ["user"]
    other.close()
    training.keeper.close()
    assert len(training.optimizer._optimizer_step_pre_hooks) == 1


def test_a_torn_capture_under_a_fused_optimizer_is_discarded_and_named(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(daemon.socket_path, fused=True)
    training.keeper.restore()
    training.run(0, 1)
    assert training.keeper._capturer is not None
    capture = training.keeper._capturer.capture
    assert capture is not None
    assert capture.settled.wait(10)
    with caplog.at_level(logging.WARNING, logger="backstay"):
        training.model[0].weight.data.mul_(2)  # no hook, no version counter: only the bytes tell
        training.step()
    assert "model.0.weight changed between snapshot(1)" in caplog.text
    assert training.keeper.wait_committed()
    assert daemon.committed_steps("default/r") == []
    assert [(step, "model.0.weight" in reason) for _, step, reason in daemon.runs["default/r"].abandoned] == [(1, True)]
    assert training.keeper.stats().is_synchronous
    training.keeper.snapshot(2)
    training.model[0].weight.data.mul_(2)  # harmless now
    assert training.keeper.wait_committed()
    assert daemon.committed_steps("default/r") == [2]
    training.keeper.close()


def test_an_optimizer_without_hooks_is_captured_synchronously_and_said_once(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(3, 3)

    class Bare:
        """Steps without torch's hooks."""

        def __init__(self) -> None:
            self.param_groups = [{"params": list(model.parameters()), "lr": 0.1}]
            self.state: dict[Any, Any] = {}

    with caplog.at_level(logging.WARNING, logger="backstay"):
        keeper = backstay.Snapshotter(model, Bare(), run_id="bare", socket=daemon.socket_path)  # type: ignore[arg-type]
    assert caplog.text.count("Bare runs no step hooks") == 1
    keeper.restore()
    for step in (1, 2, 3):
        assert keeper.snapshot(step).state == "started"
        model.weight.data.add_(1)
    assert keeper.wait_committed()
    assert daemon.committed_steps("default/bare") == [3]
    keeper.close()


def test_several_optimizers_and_skipping_grad_scalers_are_restored(daemon: LocalDaemon) -> None:
    def build() -> tuple[nn.Module, list[torch.optim.Optimizer], torch.amp.GradScaler]:
        torch.manual_seed(3)
        model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(model["a"].parameters(), foreach=True),
            torch.optim.SGD(model["b"].parameters(), lr=0.1, momentum=0.9),
        ]
        return model, optimizers, torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)

    def step(model: Any, optimizers: list[Any], scaler: Any, *, overflow: bool) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model["b"](torch.relu(model["a"](torch.rand(5, 4)))).square().mean() * (
            float("inf") if overflow else 1.0
        )
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()

    model, optimizers, scaler = build()
    keeper = backstay.Snapshotter(model, optimizers, run_id="two", socket=daemon.socket_path, extra={"scaler": scaler})
    keeper.restore()
    states = []
    for index in range(7):
        step(model, optimizers, scaler, overflow=index == 3)
        states.append(keeper.snapshot(index + 1).state)
    assert states == ["started"] * 3 + ["refused"] + ["started"] * 3
    keeper.fence()
    assert keeper.wait_committed()
    keeper.close()
    for index in range(3):
        step(model, optimizers, scaler, overflow=index == 1)
    again, fresh, scaler_2 = build()
    keeper = backstay.Snapshotter(again, fresh, run_id="two", socket=daemon.socket_path, extra={"scaler": scaler_2})
    assert keeper.restore().step == 7
    for index in range(3):
        step(again, fresh, scaler_2, overflow=index == 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert scaler.state_dict() == scaler_2.state_dict()
    keeper.close()


def test_a_dead_daemon_costs_a_warning_and_a_re_attach(daemon: LocalDaemon, caplog: pytest.LogCaptureFixture) -> None:
    training = Training(daemon.socket_path)
    training.keeper.restore()
    training.run(0, 3)
    daemon.kill()
    with caplog.at_level(logging.WARNING, logger="backstay"):
        before = training.keeper.stats()
        training.run(3, 30)
        after = training.keeper.stats()
        paid_s = after.fence_s + after.blocked_s - before.fence_s - before.blocked_s
        assert paid_s < 20, "training waited for a dead daemon at every step: that would be 27 times 3 s"
        poll(lambda: not training.keeper.stats().is_attached, "the loss was never noticed")
        assert len([r for r in caplog.records if "training goes on" in r.getMessage()]) == 1
        daemon.start()
        poll(lambda: training.keeper.stats().is_attached, "it never attached again")
    assert "attached again" in caplog.text
    training.run(30, 33)
    training.keeper.fence()
    assert training.keeper.wait_committed()
    assert daemon.committed_steps("default/r")[-1] == 33
    training.keeper.close()


def test_a_trainer_that_waits_for_slots_is_told_once_what_happens_and_what_would_help(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(daemon.socket_path, strict=True)
    training.keeper.restore()
    training.run(0, 3)
    assert training.keeper.stats().wait_share == 0.0, "the first slots are being made"
    daemon.slot_delay_s = 0.4  # longer than a step of this, however busy the machine is
    with caplog.at_level(logging.WARNING, logger="backstay"):
        training.run(3, 11)
        training.keeper.fence()
    assert training.keeper.wait_committed()
    stats = training.keeper.stats()
    assert LIMIT < stats.wait_share <= 1
    assert stats.skipped == 0, "no step was given up: it was slowed"
    assert 0 < stats.waited_s <= stats.fence_s
    assert 0 < daemon.runs["default/r"].waited_s <= stats.waited_s
    (said,) = caplog.messages
    for words in ("training waits", "% of its time", "a slot is not free", "interval", "bandwidth", "not logged"):
        assert words in said
    training.keeper.close()


def test_which_ranks_take_no_snapshots_is_logged_once_whatever_becomes_of_ones_own(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(daemon.socket_path)
    training.keeper.restore()
    daemon.notice = "rank 1 on n2 has taken no snapshot since restore()"
    with caplog.at_level(logging.WARNING, logger="backstay"):
        training.run(0, 3)
        training.keeper.fence()
        assert training.keeper.wait_committed()
        daemon.hold_slots = True
        training.run(3, 6)
        training.keeper.fence()
    assert [message for message in caplog.messages if "rank 1 on n2" in message] == [
        f"backstay: {daemon.notice} (further occurrences are not logged)",
        *[m for m in caplog.messages if "is not captured" in m],  # the step that found no slot says the same of why
    ]
    assert training.keeper.stats().last_problem == daemon.notice
    training.keeper.close()


def test_a_daemon_that_is_restarted_during_a_long_step_has_its_trainer_back_before_the_step_ends(
    daemon: LocalDaemon,
) -> None:
    training = Training(daemon.socket_path)
    training.keeper.restore()
    training.run(0, 3)
    assert training.keeper.wait_committed()
    daemon.kill()
    poll(lambda: not training.keeper.stats().is_attached, "nobody looked whether the daemon is there")
    daemon.start()
    poll(lambda: training.keeper.stats().is_attached, "the trainer waited for its next snapshot")
    before = training.keeper.stats()
    training.run(3, 6)
    assert training.keeper.wait_committed()
    assert daemon.committed_steps("default/r")[-1] == 6
    assert training.keeper.stats().skipped == before.skipped, "no snapshot was lost to it"
    training.keeper.close()


def test_a_frozen_daemon_stops_a_step_at_most_once(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path, max_wait_s=0.4)
    training.keeper.restore()
    training.run(0, 3)
    training.keeper.fence()
    training.keeper.wait_committed()
    daemon.is_frozen = True
    before = training.keeper.stats().fence_s
    training.run(3, 40)
    assert training.keeper.stats().fence_s - before < 8, "each of 37 steps waiting 0.4 s would be 15 s"
    daemon.is_frozen = False
    poll(lambda: training.keeper.stats().is_attached, "it never came back")
    steps = iter(range(41, 10_000))

    def commits() -> bool:
        training.run(step := next(steps), step + 1)
        return bool(daemon.committed_steps("default/r")[-1:] > [40])

    poll(commits, "nothing was committed after the thaw")
    training.keeper.close()


def test_a_daemon_without_slots_lets_steps_pass(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path, max_wait_s=0.2)
    training.keeper.restore()
    daemon.hold_slots = True
    training.run(0, 5)
    training.keeper.fence()
    assert training.keeper.wait_committed()
    stats = training.keeper.stats()
    assert (stats.committed, stats.skipped) == (0, 5)
    assert stats.last_problem == "slots are held by the test"
    daemon.hold_slots = False
    training.run(5, 6)
    training.keeper.fence()
    assert training.keeper.wait_committed()
    assert daemon.committed_steps("default/r") == [6]
    training.keeper.close()


def test_a_strict_keeper_raises_what_others_warn_about(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path, strict=True, max_wait_s=0.2)
    training.keeper.restore()
    training.run(0, 2)
    daemon.kill()
    with pytest.raises(backstay.BackstayError):
        training.run(2, 30)
    training.keeper.close()


def test_a_trainer_of_an_older_world_stops_taking_snapshots(
    daemon: LocalDaemon, caplog: pytest.LogCaptureFixture
) -> None:
    old = Training(daemon.socket_path)
    old.keeper.restore()
    old.run(0, 2)
    old.keeper.fence()
    old.keeper.wait_committed()
    new = Training(daemon.socket_path)
    assert new.keeper.restore().step == 2
    with caplog.at_level(logging.WARNING, logger="backstay"):
        old.run(2, 6)
        old.keeper.fence()
        old.keeper.wait_committed()
    assert "older world" in caplog.text
    new.run(2, 3)
    new.keeper.fence()
    assert new.keeper.wait_committed()
    assert daemon.committed_steps("default/r") == [3]
    old.keeper.close()
    new.keeper.close()


def test_a_forked_child_has_neither_slots_nor_descriptors(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path)
    training.keeper.restore()
    training.run(0, 3)
    training.keeper.fence()
    training.keeper.wait_committed()
    mine = _held_of(daemon)
    assert mine
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        found = _held_of(daemon)
        training.keeper.fence()
        status = training.keeper.snapshot(99)
        training.keeper.close()
        os.write(write_end, repr((found, status.state)).encode())
        os._exit(0)
    os.close(write_end)
    text = os.read(read_end, 10_000).decode()
    os.close(read_end)
    os.waitpid(pid, 0)
    assert text == "([], 'refused')"
    training.run(3, 5)  # the parent's session goes on
    training.keeper.fence()
    assert training.keeper.wait_committed()
    assert daemon.committed_steps("default/r") == [5]
    training.keeper.close()
    assert _held_of(daemon) == []


def _held_of(daemon: LocalDaemon) -> list[str]:
    """Mappings and descriptors of slot files in this process."""
    with open("/proc/self/maps") as maps:
        held = [line.split()[-1] for line in maps if "/slot-" in line and str(daemon.directory) in line]
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if "/slot-" in target and str(daemon.directory) in target:
            held.append(target)
    return held


def test_restore_cancels_a_running_capture(daemon: LocalDaemon) -> None:
    training = Training(daemon.socket_path)
    training.keeper.restore()
    training.run(0, 3)  # the capture of step 3 is not fenced
    assert training.keeper.restore().step in (2, 3)
    training.step()
    assert training.keeper.snapshot(4).state == "started"
    training.keeper.close()


def test_closing_leaves_no_thread_behind(daemon: LocalDaemon) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with Training(daemon.socket_path).keeper as keeper:
        keeper.restore()
        assert any(thread.name == "backstay-session" for thread in threading.enumerate())
    poll(
        lambda: not {t.name for t in threading.enumerate() if t.name.startswith("backstay")} - before,
        "a thread was left over",
    )


def test_each_start_writes_one_line_where_training_was_started(
    daemon: LocalDaemon, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def written() -> list[str]:
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("backstay: ")]

    logging.getLogger("backstay").setLevel(logging.WARNING)  # as where nobody configured anything
    try:
        training = Training(daemon.socket_path)
        training.keeper.restore()
        assert written() == ["backstay: new run default/r"]
        training.run(0, 2)
        training.keeper.close()
        again = Training(daemon.socket_path)
        assert again.keeper.restore().step == 2
        assert written() == ["backstay: restored step 2 of default/r (EXACT), attempt 2"]
        again.keeper.close()
        with caplog.at_level(logging.INFO, "backstay"):
            third = Training(daemon.socket_path)
            third.keeper.restore()
            third.keeper.close()
        assert "backstay: restored step 2 of default/r (EXACT), attempt 3" in caplog.messages
        assert written() == [], "a log that is read is enough"
    finally:
        logging.getLogger("backstay").setLevel(logging.NOTSET)
