"""The trainer process of the benchmark: holds the state, and runs steps and saves as commanded, one JSON line each.

A real process with torch and a gloo world, because blocking, page faults and scheduling are measured. Must not
measure anything but itself; the driver takes cluster-wide figures.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import backstay
from backstay.format import json_records
from backstay.restore import load
from backstay.restore.result import Loaded
from backstay.restore.snapshot import OpenedSnapshot
from backstay.testing.command_process import serve_commands
from bench import peers, state
from bench.baselines import Memcpy
from bench.driver import TrainerSettings
from bench.measure import MeasurementError, stopwatch

COMMIT_DEADLINE_S = 120.0
_SETTLE_S = 0.05


class BackstaySaver:
    """backstay as a training loop uses it."""

    peak_bytes = 0
    was_scheduled = True

    def __init__(self, training: state.TrainingState, settings: TrainerSettings) -> None:
        self.keeper = backstay.Snapshotter(
            training.model,
            training.optimizer,
            run_id=settings.run_id,
            socket=settings.socket,
            max_wait_s=settings.max_wait_s,
        )

    def save(self, step: int) -> None:
        self.was_scheduled = self.keeper.snapshot(step).state != "not_scheduled"

    def wait(self) -> None:
        """Return when the newest snapshot is captured, digested and committed (or was skipped)."""
        self.keeper.fence()  # ends the byte check of some snapshots
        if not self.keeper.wait_committed(COMMIT_DEADLINE_S):
            raise MeasurementError(f"no commit within {COMMIT_DEADLINE_S:.0f} s", reason="commit_slow")

    def settle(self) -> None:
        """Let the next slot be reserved, and the daemons finish their work for this snapshot."""
        self.wait()
        time.sleep(_SETTLE_S)

    def held_bytes(self) -> int:
        return self.peak_bytes  # the driver reads the nodes' memory


class LoadClock:
    """Times the loading part of restore(), without the preceding wait for the decision."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._prepare, self.load = load.prepare, load.Prepared.load
        load.prepare = self._timed_prepare
        load.Prepared.load = functools.partialmethod(_timed_load, self)  # type: ignore[method-assign, assignment]

    def _timed_prepare(self, target: load.Target, opened: OpenedSnapshot) -> load.Prepared:
        begin = time.perf_counter()
        try:
            return self._prepare(target, opened)
        finally:
            self.seconds = time.perf_counter() - begin


def _timed_load(prepared: load.Prepared, clock: LoadClock) -> Loaded:
    begin = time.perf_counter()
    try:
        return clock.load(prepared)
    finally:
        clock.seconds += time.perf_counter() - begin


class Trainer:
    """One rank; every public method ``do_*`` is a command and returns a JSON object."""

    def __init__(self, settings: TrainerSettings) -> None:
        self.settings = settings
        self.step = 0
        self.training = (
            state.build_frozen(settings.size_bytes, frozen=settings.frozen, seed=settings.rank)
            if settings.frozen
            else state.build(settings.size_bytes, seed=settings.rank)
        )
        self.scratch = Path(settings.scratch)
        self.backstay: BackstaySaver | None = None
        self.load_clock = LoadClock()
        self.memcpy: Memcpy | None = None
        self.dcp: dict[str, peers.DcpSave] = {}

    def do_hello(self) -> dict[str, Any]:
        return {"size_bytes": self.training.size_bytes, "pid": os.getpid()}

    def do_calibrate(self, seconds: float) -> dict[str, Any]:
        state.calibrate(self.training, seconds)
        rows = torch.tensor([self.training.batch.shape[0]])
        dist.broadcast(rows, src=0)
        self.training.batch = torch.randn(int(rows), self.training.batch.shape[1])
        return {"rows": int(rows)}

    def do_attach(self) -> dict[str, Any]:
        """A new Snapshotter and its restore(); replaces the former one."""
        if self.backstay is not None:
            self.backstay.keeper.close()
        self.backstay = BackstaySaver(self.training, self.settings)
        with stopwatch() as watch:
            result = self.backstay.keeper.restore()
        self.step = max(self.step, result.step)
        return {
            "outcome": str(result.outcome),
            "step": result.step,
            "total_s": watch.seconds,
            "load_s": self.load_clock.seconds,
            "stolen_s": watch.stolen_s,
        }

    def do_memcpy(self) -> dict[str, Any]:
        """One copy each way; the buffers are made at the first call."""
        if self.memcpy is None:
            path = self.scratch / f"memcpy-{self.settings.rank}"
            self.memcpy = Memcpy(path, self.training.size_bytes)
        write, read = self.memcpy.to_tmpfs(), self.memcpy.from_tmpfs()
        return {"to_tmpfs_s": write.seconds, "from_tmpfs_s": read.seconds, "stolen_s": write.stolen_s + read.stolen_s}

    def do_drop_memcpy(self) -> dict[str, Any]:
        if self.memcpy is not None:
            self.memcpy.close()
            self.memcpy = None
        return {}

    def do_steps(self, *, count: int, kind: str, method: str, waiting_s: float = 0.0) -> dict[str, Any]:
        """``count`` steps after one that is not timed; with ``method`` not "none", a save after every one of them."""
        saver = self._saver(method)
        committed_before = self._committed()
        one_step: Callable[[], None] = (
            self.training.cpu_step if kind == "cpu" else lambda: self.training.waiting_step(waiting_s)
        )
        signal = torch.zeros(1)
        step_s: list[float] = []
        block_s: list[float] = []
        dist.barrier()
        with stopwatch() as watch:
            for _ in range(count + 1):
                begin = time.perf_counter()
                one_step()
                dist.all_reduce(signal)  # ranks advance in lockstep, as in any training
                self.step += 1
                stepped = time.perf_counter()
                if saver is not None:
                    saver.save(self.step)
                ended = time.perf_counter()
                step_s.append(ended - begin)
                block_s.append(ended - stepped)
        if saver is not None:
            saver.wait()
        answer = {"step_s": step_s[1:], "block_s": block_s[1:], "stolen_s": watch.stolen_s, "step": self.step}
        return {**answer, "taken": self._committed() - committed_before}

    def do_save(self, method: str) -> dict[str, Any]:
        """One save on its own: the time until it is whole (backstay: captured, digested, committed)."""
        saver = self._saver(method)
        if saver is None:
            raise MeasurementError("nothing to save with", reason="bad_method")
        self.training.waiting_step(0.0)
        hashed_before = saver.keeper.stats().hashed_bytes if isinstance(saver, BackstaySaver) else 0
        self.step += 1
        cpu_s = time.process_time()
        with stopwatch() as watch:
            saver.save(self.step)
            while isinstance(saver, BackstaySaver) and not saver.was_scheduled:  # costs microseconds
                self.step += 1
                saver.save(self.step)
            saver.wait()
        cpu_s = time.process_time() - cpu_s
        if isinstance(saver, BackstaySaver):
            saver.settle()
        answer: dict[str, Any] = {"seconds": watch.seconds, "stolen_s": watch.stolen_s, "cpu_s": cpu_s}
        answer["is_taken"] = True
        if isinstance(saver, BackstaySaver):
            stats = saver.keeper.stats()
            answer["hashed_bytes"] = stats.hashed_bytes - hashed_before
            answer |= {"is_taken": stats.last_committed_step == self.step, "why_not": str(stats)}
        return answer

    def do_load(self) -> dict[str, Any]:
        """``dcp.load`` of the newest ``dcp.save``, in place."""
        saver = self._saver("dcp_save")
        assert isinstance(saver, peers.DcpSave)
        with stopwatch() as watch:
            saver.load()
        return {"seconds": watch.seconds, "stolen_s": watch.stolen_s}

    def do_remove(self, method: str) -> dict[str, Any]:
        """Free what a peer holds on tmpfs."""
        saver = self.dcp.pop(method, None)
        held = 0
        if saver is not None:
            saver.wait()
            held = saver.held_bytes()
            dist.barrier()
            saver.remove()
        return {"held_bytes": held}

    def do_finish(self) -> dict[str, Any]:
        if self.backstay is not None:
            self.backstay.keeper.finish()
            self.backstay.keeper.close()
            self.backstay = None
        self.do_drop_memcpy()
        return {}

    def _committed(self) -> int:
        return 0 if self.backstay is None else self.backstay.keeper.stats().committed

    def _saver(self, method: str) -> peers.Saver | None:
        if method == "none":
            return None
        if method == "backstay":
            return self.backstay
        if method not in self.dcp:
            kind = {"dcp_save": peers.DcpSave, "dcp_async_save": peers.DcpAsyncSave}[method]
            self.dcp[method] = kind(self.training, self.scratch / f"{method}", self.settings.rank)
        return self.dcp[method]


def main(argument: str) -> int:
    """Serve commands from standard input until it ends; the answer to each is one line on standard output."""
    settings = json_records.loads(TrainerSettings, argument)
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to standard error
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{settings.port}", rank=settings.rank, world_size=settings.world_size
    )
    serve_commands(Trainer(settings), answers)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
