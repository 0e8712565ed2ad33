"""The notes of the ranks: reads their JSON lines while they train, and compares two runs line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

Line = dict[str, Any]
_DIGESTS: Final = ("parameters", "optimizer", "rng")


@dataclass(slots=True)
class RunNotes:
    """All lines of one run by rank, in the order written; :meth:`poll` reads new ones."""

    directory: Path
    world_size: int
    active_count: int = 0  # ranks of the current world; fewer than ``world_size`` once the run has shrunk
    ranks: list[list[Line]] = field(default_factory=list)
    _offsets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.active_count = self.active_count or self.world_size
        self.ranks = [[] for _ in range(self.world_size)]
        self._offsets = [0] * self.world_size

    def poll(self) -> list[tuple[int, Line]]:
        """Read the new complete lines; returns them with their rank."""
        new: list[tuple[int, Line]] = []
        for rank in range(self.world_size):
            try:
                with (self.directory / f"rank-{rank:05d}.jsonl").open("rb") as file:
                    file.seek(self._offsets[rank])
                    text = file.read()
            except FileNotFoundError:
                continue
            whole = text[: text.rfind(b"\n") + 1]
            self._offsets[rank] += len(whole)
            lines = [json.loads(line) for line in whole.splitlines()]
            self.ranks[rank] += lines
            new += [(rank, line) for line in lines]
        return new

    def of(self, rank: int, kind: str) -> list[Line]:
        return [line for line in self.ranks[rank] if line["kind"] == kind]

    @property
    def active(self) -> list[list[Line]]:
        """The lines of the ranks of the current world."""
        return self.ranks[: self.active_count]

    def pids(self) -> list[int]:
        """The pid of each rank's newest trainer; 0 if none has started."""
        return [next((line["pid"] for line in reversed(lines) if line["kind"] == "start"), 0) for lines in self.active]

    def highest_step(self) -> int:
        """The newest step any rank ever finished."""
        return max((line["step"] for lines in self.ranks for line in lines if line["kind"] == "step"), default=0)

    def step_reached_by_all(self) -> int:
        """The newest step that every rank has reported (in any world)."""
        return min(max((line["step"] for line in lines if line["kind"] == "step"), default=0) for lines in self.active)

    def restored_since(self, time_unix_s: float) -> list[Line | None]:
        """Of each rank, the newest ``restored`` line after ``time_unix_s``."""
        found: list[Line | None] = []
        for rank in range(self.active_count):
            lines = [line for line in self.of(rank, "restored") if line["time_unix_s"] > time_unix_s]
            found.append(lines[-1] if lines else None)
        return found

    def first_step_after(self, rank: int, line: Line) -> Line | None:
        """The first ``step`` line of ``rank`` written after ``line``."""
        position = next(index for index, other in enumerate(self.ranks[rank]) if other is line)
        return next((other for other in self.ranks[rank][position:] if other["kind"] in ("step", "end")), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The verdict over two runs; ``first_difference`` is a sentence, empty when everything is equal."""

    first_difference: str
    difference_count: int
    compared_steps: int
    redone_steps: int
    restored_states: int

    @property
    def is_equal(self) -> bool:
        return self.difference_count == 0


def compare(control: RunNotes, run: RunNotes, *, steps: int) -> Comparison:
    """Compare every step line, every restored state and the end of ``run`` with ``control``, bit by bit."""
    differences: list[str] = []
    compared = redone = restored = 0
    for rank in range(control.world_size):
        truth = {line["step"]: line for line in control.of(rank, "step")}
        seen: set[int] = set()
        for line in run.ranks[rank]:
            if line["kind"] == "step":
                compared += 1
                redone += line["step"] in seen
                seen.add(line["step"])
            restored += line["kind"] == "restored" and line["step"] > 0
            differences += _line_differences(rank, line, truth)
        missing = [step for step in range(1, steps + 1) if step not in seen]
        differences += [f"rank {rank} never reported step {step}" for step in missing]
        if not run.of(rank, "end"):
            differences.append(f"rank {rank} never finished")
        if missing_truth := [step for step in range(1, steps + 1) if step not in truth]:
            differences.append(f"rank {rank} of the control run never reported step {missing_truth[0]}")
    return Comparison(
        first_difference=differences[0] if differences else "",
        difference_count=len(differences),
        compared_steps=compared,
        redone_steps=redone,
        restored_states=restored,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrinkage:
    """Compares a run that permanently lost ranks with one that kept them all.

    ``worlds``: sizes in order. ``loss_difference``: the largest relative difference of a step's loss from the control run's.
    ``losses``: (step, ranks, loss, loss of the control run).
    """

    first_difference: str
    worlds: tuple[int, ...]
    restored_states: int
    equal_steps: int
    loss_difference: float
    losses: tuple[tuple[int, int, float, float], ...]


def compare_shrunk(control: RunNotes, run: RunNotes, *, steps: int) -> Shrinkage:
    """Every restored full state must be bitwise the one noted at that step; loss values are compared as numbers."""
    truth = {line["step"]: line for line in control.of(0, "step")}
    noted: dict[int, Line] = {}
    losses: dict[int, tuple[int, int, float, float]] = {}
    worlds: list[int] = []
    first, restored, equal = "", 0, 0
    for line in run.ranks[0]:
        step = line.get("step", 0)
        if line["kind"] == "start" and (not worlds or worlds[-1] != line["world_size"]):
            worlds.append(line["world_size"])
        elif line["kind"] == "step" and step in truth:
            noted[step] = line
            equal += all(line[name] == truth[step][name] for name in _DIGESTS)
            losses[step] = (step, worlds[-1], line["value"], truth[step]["value"])
        elif line["kind"] == "restored" and step > 0:
            restored += 1
            differing = [name for name in _DIGESTS if step in noted and line[name] != noted[step][name]]
            if differing or step not in noted:
                first = (
                    first
                    or f"the state restored at step {step} differs from the one noted: {differing or 'never noted'}"
                )
    missing = [step for step in range(1, steps + 1) if step not in losses]
    if missing or not run.of(0, "end"):
        first = first or f"the run never reported step {missing[0] if missing else steps}"
    return Shrinkage(
        first_difference=first,
        worlds=tuple(worlds),
        restored_states=restored,
        equal_steps=equal,
        loss_difference=max((abs(a - b) / abs(b) for _, _, a, b in losses.values()), default=0.0),
        losses=tuple(losses[step] for step in sorted(losses)),
    )


def _line_differences(rank: int, line: Line, truth: dict[int, Line]) -> Iterator[str]:
    kind, step = line["kind"], line.get("step", 0)
    if kind not in ("step", "restored", "end") or step == 0:
        return
    if (expected := truth.get(step)) is None:
        yield f"rank {rank} reported step {step}, which the control run does not have"
        return
    when = {"step": f"after step {step}", "restored": f"as restored to step {step}", "end": "at the end"}[kind]
    if kind == "step" and line["loss"] != expected["loss"]:
        yield f"rank {rank}, step {step}: loss bits {line['loss']} ({line['value']!r}), control {expected['loss']}"
    for name in _DIGESTS:
        if line[name] != expected[name]:
            yield f"rank {rank} {when}: {name} {line[name][:16]}…, control {expected[name][:16]}…"
