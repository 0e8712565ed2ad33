"""Runs the demo: the control run, then the run with its faults, then the verdict. Leaves nothing behind."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from backstay.errors import BackstayError, UsageError
from backstay.testing.cluster import LocalCluster
from backstay.testing.demo.injection import RECOVERY_DEADLINE_S, FaultRecord, Injector, coordinator_faults
from backstay.testing.demo.launch import TorchRun, write_text
from backstay.testing.demo.notes import RunNotes, compare, compare_shrunk
from backstay.testing.demo.report import Report, stolen_core_seconds
from backstay.testing.demo.scenario import Scenario, parse
from backstay.testing.demo.watch import LostForGoodError, Printer, Watch
from backstay.testing.guardian import guarded
from backstay.testing.processes import ProcessKeeper
from backstay.testing.rolling import RedundancyWatch, watched

_START_DEADLINE_S: Final = 300.0
LOSS_TOLERANCE: Final = 1e-3  # relative; float32 sums in another order, carried through the steps that follow
_FOOTNOTE: Final = (
    "resumed after: from the fault to the first step of all ranks, including torchrun's rendezvous and process start,\n"
    "which take most of it; for a daemon, to the first snapshot that is protected with its participation."
)
_REFUSALS_DEADLINE_S: Final = 15.0


def run(argv: Sequence[str] | None) -> int:
    """Parse the flags, run the demo, print and write the report; returns the exit status."""
    try:
        scenario = parse(argv)
    except UsageError as error:
        sys.stderr.write(f"demo: {error}\n")
        return UsageError.exit_code
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with work_directory(scenario) as directory:
            return Demo(scenario, directory).run()
    except BackstayError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("demo: interrupted; all its processes were stopped\n")
        return 130


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def work_directory(scenario: Scenario) -> Iterator[Path]:
    """A directory on tmpfs for notes and logs; copied to ``--keep-logs`` and deleted at the end."""
    directory = Path(tempfile.mkdtemp(prefix=f"backstay-demo-{os.getpid()}-", dir="/dev/shm"))
    try:
        yield directory
    finally:
        if scenario.keep_logs is not None:
            shutil.copytree(directory, scenario.keep_logs, dirs_exist_ok=True)
        shutil.rmtree(directory, ignore_errors=True)


class Demo:
    """One demo run; its parts share the printer, the directory and the deadline."""

    def __init__(self, scenario: Scenario, directory: Path) -> None:
        self.scenario = scenario
        self.directory = directory
        self.printer = Printer()
        self.deadline = time.monotonic() + scenario.deadline_s
        self.text = directory / "text"
        self.report = Report(scenario=scenario)
        self.redundancy: RedundancyWatch | None = None

    def run(self) -> int:
        scenario = self.scenario
        stolen = stolen_core_seconds()
        size = write_text(self.text)
        self.printer.say(
            f"{scenario.world_size} ranks on {scenario.nodes} nodes, k={scenario.k}, m={scenario.m};"
            f" byte-level GPT d={scenario.d_model}, {scenario.layers} layers, FSDP2, {scenario.steps} steps,"
            f" {size / 1e6:.1f} MB of Python sources; faults: {len(scenario.faults)}"
        )
        control = None if scenario.is_beyond_redundancy else self._control()
        notes = self._protected()
        self.report.stolen_core_s = stolen_core_seconds() - stolen
        status = self._judge(control, notes)
        if scenario.json_path is not None:
            self.report.write(scenario.json_path)
            self.printer.say(f"report written to {scenario.json_path}")
        return status

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _control(self) -> RunNotes:
        """The undisturbed run; it never imports backstay."""
        began = time.monotonic()
        self.printer.say("control run: undisturbed, and without importing backstay")
        keeper = ProcessKeeper(secrets.token_hex(4), self.directory / "logs")
        run = TorchRun(
            scenario=self.scenario,
            directory=self.directory,
            text=self.text,
            run_id="",
            spawn=lambda node, argv, env, name: keeper.spawn(argv, env=_plus(env), name=name, node=f"control-{node}"),
            spawn_beside=lambda argv, env, name: keeper.spawn(argv, env=_plus(env), name=name),
        )
        notes = RunNotes(run.notes_dir, self.scenario.world_size)
        watch = Watch(run=run, notes=notes, keeper=keeper, printer=self.printer, deadline=self.deadline)
        with guarded(keeper.cluster_id, self.directory):
            try:
                run.start()
                watch.wait(notes.step_reached_by_all, _START_DEADLINE_S, "the first step")
                watch.wait_for_end(self.scenario.deadline_s)
            finally:
                keeper.kill()
        self.report.control_s = time.monotonic() - began
        self.printer.say(f"control run: done in {self.report.control_s:.0f} s")
        return notes

    def _protected(self) -> RunNotes:
        """The run with the scenario's faults."""
        scenario = self.scenario
        began = time.monotonic()
        armed = self.directory / "coordinator-lives"
        has_coordinator_fault = any(fault.kind == "coordinator" for fault in scenario.faults)
        cluster = LocalCluster(
            scenario.nodes,
            scenario.m,
            scenario.k + scenario.m,
            lease_s=scenario.lease_s,
            coordinator_env=coordinator_faults(armed) if has_coordinator_fault else None,
            keep_logs=self.directory / "logs",
        )
        self.printer.say(f"protected run: starting a coordinator and {scenario.nodes} node daemons in {cluster.root}")
        with cluster:
            run = TorchRun(
                scenario=scenario,
                directory=self.directory,
                text=self.text,
                run_id=f"gpt-{secrets.token_hex(3)}",
                spawn=lambda node, argv, env, name: cluster.run_on_node(node, argv, env, name=name),
                spawn_beside=lambda argv, env, name: cluster.run_beside(argv, env, name=name),
            )
            notes = RunNotes(run.notes_dir, scenario.world_size)
            watch = Watch(
                run=run,
                notes=notes,
                keeper=cluster.keeper,
                printer=self.printer,
                deadline=self.deadline,
                cluster=cluster,
            )
            injector = Injector(scenario=scenario, cluster=cluster, run=run, watch=watch, armed=armed)
            self.report.faults = injector.records
            try:
                self._course(run, watch, injector)
            finally:
                self.report.timeline = [watch.timeline[key] for key in sorted(watch.timeline)]
        self.report.protected_s = time.monotonic() - began
        return notes

    def _course(self, run: TorchRun, watch: Watch, injector: Injector) -> None:
        run.permit(self.scenario.last_permitted_step(0))
        run.start()
        watch.wait(watch.notes.step_reached_by_all, _START_DEADLINE_S, "the first step")
        try:
            with self._watching(injector.cluster, run):
                for survived, fault in enumerate(self.scenario.faults, 1):
                    injector.inject(fault)
                    if survived < len(self.scenario.faults):
                        run.permit(self.scenario.last_permitted_step(survived))
            run.permit(self.scenario.last_permitted_step(len(self.scenario.faults)))
            watch.wait_for_end(RECOVERY_DEADLINE_S)
        except LostForGoodError as error:
            self.report.verdict = str(error)
            if injector.records:
                _see_refusal(watch, injector.records[-1], str(error))

    @contextmanager
    def _watching(self, cluster: LocalCluster, run: TorchRun) -> Iterator[None]:
        """With ``--rolling`` the redundancy is sampled until the trainers may finish and free their memory."""
        if not self.scenario.rolling:
            yield
            return
        with watched(cluster, f"demo/{run.run_id}", parity=self.scenario.m) as self.redundancy:
            yield

    # -- verdict ------------------------------------------------------------------------------------------------------

    def _judge(self, control: RunNotes | None, notes: RunNotes) -> int:
        report = self.report
        sys.stdout.write(f"\n{report.table()}\n\n{_FOOTNOTE}\n\n")
        if report.verdict or control is None:
            return self._judge_loss(notes)
        if self.scenario.shrink:
            return self._judge_shrunk(control, notes)
        report.comparison = compare(control, notes, steps=self.scenario.steps)
        interrupted = [record.what for record in report.faults if record.outcome == "INTERRUPTED"]
        report.bitwise_equal = report.comparison.is_equal
        compared = report.comparison
        is_whole = compared.is_equal and not interrupted
        if not compared.is_equal:
            report.verdict = f"NOT bitwise equal: {compared.first_difference} ({compared.difference_count} differences)"
        elif interrupted:
            report.verdict = f"bitwise equal, but training was interrupted by: {interrupted[0]}"
        else:
            report.verdict = (
                f"bitwise equal: {compared.compared_steps} steps of {control.world_size} ranks ({compared.redone_steps}"
                f" of them computed twice), {compared.restored_states} restored states, and every final parameter,"
                " optimizer state and RNG"
            )
        if self.redundancy is not None:
            is_whole = self._judge_rolling(self.redundancy, is_whole=compared.is_equal and not interrupted)
        self.printer.say(
            f"control {report.control_s:.0f} s, protected {report.protected_s:.0f} s,"
            f" {report.stolen_core_s:.1f} core-seconds taken by the host"
        )
        sys.stdout.write(f"\n{report.verdict}\n")
        return 0 if is_whole else 1

    def _judge_rolling(self, redundancy: RedundancyWatch, *, is_whole: bool) -> bool:
        """Whether nothing was lost on the way, besides equal bits at the end; extends the verdict."""
        report = self.report
        assert report.comparison is not None
        problems = redundancy.complaints()
        if report.comparison.redone_steps:
            problems.append(f"{report.comparison.redone_steps} steps were computed twice")
        if not redundancy.samples:
            problems.append("the coordinator's status was never seen")
        if problems:
            report.verdict += f"; BUT {'; '.join(problems[:3])}{' ...' if len(problems) > 3 else ''}"
        elif is_whole:
            report.verdict += (
                f"; {len(report.faults)} restarts cost no step, protected never went back, and in {len(redundancy.samples)} "
                "samples no redundancy was missing"
            )
        return is_whole and not problems

    def _judge_shrunk(self, control: RunNotes, notes: RunNotes) -> int:
        """A world that permanently lost ranks: restored states bitwise, loss values up to the order of additions."""
        found = self.report.shrinkage = compare_shrunk(control, notes, steps=self.scenario.steps)
        worlds = " → ".join(map(str, found.worlds))
        is_near = found.loss_difference <= LOSS_TOLERANCE
        if found.first_difference:
            self.report.verdict = f"NOT what it was: {found.first_difference}"
        else:
            self.report.verdict = (
                f"ranks {worlds}: {found.restored_states} restored states bitwise what they were, {found.equal_steps} steps"
                f" bitwise the control run's; losses differ from it by at most {found.loss_difference:.1e} (relative)"
                + ("" if is_near else f", MORE than {LOSS_TOLERANCE:g}")
            )
        sys.stdout.write(f"\n{self.report.verdict}\n")
        return 0 if is_near and not found.first_difference else 1

    def _judge_loss(self, notes: RunNotes) -> int:
        """A run that lost more than m nodes: the product's message, and proof that no rank continued."""
        report = self.report
        record = report.faults[-1] if report.faults else None
        since = record.injected_unix_s if record is not None else 0.0
        continued = [rank for rank, line in enumerate(notes.restored_since(since)) if line is not None]
        if not report.verdict:
            report.verdict = (
                f"losing {self.scenario.lose} nodes with m={self.scenario.m} was not noticed: the run continued"
            )
        refused = record.refused_ranks if record is not None else []
        sys.stdout.write(f"restore() was refused on ranks {refused}; its message:\n\n  {report.verdict}\n\n")
        if continued:
            sys.stdout.write(f"WRONG: ranks {continued} continued anyway\n")
        else:
            sys.stdout.write("Nothing was loaded and no rank continued: the training run ends here.\n")
        return 1


def _see_refusal(watch: Watch, record: FaultRecord, message: str) -> None:
    """Wait, for a bounded time, until every rank was refused, and record it: no rank may have continued."""
    record.outcome, record.message = "REFUSED", message
    deadline = time.monotonic() + _REFUSALS_DEADLINE_S
    while len(_refused_ranks(watch, record)) < watch.notes.world_size and time.monotonic() < deadline:
        watch.notes.poll()
        time.sleep(0.1)
    record.refused_ranks = _refused_ranks(watch, record)
    watch.read_status()
    event = watch.first_event(record.injected_unix_s, "node_lost")
    record.detected_s = float(event["time_unix_s"]) - record.injected_unix_s if event else None


def _refused_ranks(watch: Watch, record: FaultRecord) -> list[int]:
    return [
        rank
        for rank in range(watch.notes.world_size)
        if any(
            line["error"] == "UnrecoverableError" and line["time_unix_s"] > record.injected_unix_s
            for line in watch.notes.of(rank, "error")
        )
    ]


def _plus(env: Mapping[str, str]) -> dict[str, str]:
    return dict(os.environ) | dict(env)
