"""What restore() writes while it waits: a line for each new cause, and none a second for the same one."""

from __future__ import annotations

import logging

import pytest

from backstay.protocol import messages
from backstay.session.progress import Progress


class Seconds:
    """The clock that progress is written by."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage().split(" s: ", 1)[1] for record in caplog.records]


def test_a_cause_is_written_once_a_minute_and_moving_numbers_every_ten_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="backstay")
    seconds = Seconds()
    progress = Progress(rank=3, clock=seconds.monotonic)
    for _ in range(120):
        seconds.now += 1.0
        progress.report("daemon at /s is not available (refused); trying again until the deadline")
    assert len(lines_of(caplog)) == 2
    caplog.clear()
    for done in range(30):
        seconds.now += 1.0
        progress(messages.Progress(phase="fetching", detail="node-1", done_bytes=done << 20, total_bytes=64 << 20))
    assert len(lines_of(caplog)) == 3
    assert lines_of(caplog)[0] == "fetching 0 of 64 MiB: node-1"
    seconds.now += 1.0
    progress(messages.Progress(phase="recording", detail="", done_bytes=0, total_bytes=0))
    assert lines_of(caplog)[-1] == "recording", "another cause is written at once"
