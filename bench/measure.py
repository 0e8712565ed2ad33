"""Timings with their count, spread, and the CPU time that the hypervisor took meanwhile.

Only bookkeeping over clocks and /proc/stat; must not decide what is measured.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backstay.errors import BackstayError


class MeasurementError(BackstayError):
    """A measurement could not be made; the benchmark's numbers would be wrong, so it ends with exit status 1."""


def stolen_cpu_s() -> float:
    """CPU seconds the hypervisor took from this machine since boot (``steal`` of /proc/stat); 0.0 where unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
        return int(fields[8]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


@dataclass(slots=True)
class Samples:
    """Repeated measurements of one quantity, with the CPU seconds stolen while they ran."""

    unit: str
    values: list[float] = field(default_factory=list)
    stolen_s: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    def add(self, value: float, stolen_s: float = 0.0) -> None:
        self.values.append(value)
        self.stolen_s += stolen_s

    @property
    def median(self) -> float:
        if not self.values:
            raise MeasurementError(f"no sample was taken of a quantity in {self.unit}", reason="no_samples")
        return statistics.median(self.values)

    def summary(self) -> dict[str, Any]:
        """JSON object: median, min, max, rounds, unit, stolen CPU seconds, notes."""
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "rounds": len(self.values),
            "unit": self.unit,
            "stolen_cpu_s": round(self.stolen_s, 3),
            **self.notes,
        }


@dataclass(slots=True)
class Stopwatch:
    """Filled in when the block of :func:`stopwatch` ends."""

    seconds: float = 0.0
    stolen_s: float = 0.0


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Time a block: wall seconds and stolen CPU seconds (valid after the block)."""
    watch = Stopwatch()
    stolen = stolen_cpu_s()
    begin = time.perf_counter()
    try:
        yield watch
    finally:
        watch.seconds = time.perf_counter() - begin
        watch.stolen_s = stolen_cpu_s() - stolen


class Collection:
    """All samples of one run, by name."""

    def __init__(self) -> None:
        self.samples: dict[str, Samples] = {}

    def add(self, name: str, value: float, *, unit: str, stolen_s: float = 0.0) -> None:
        self.samples.setdefault(name, Samples(unit)).add(value, stolen_s)

    def note(self, name: str, **notes: Any) -> None:
        self.samples[name].notes.update(notes)

    def median(self, name: str) -> float:
        if name not in self.samples:
            raise MeasurementError(f"{name} was not measured", reason="no_samples")
        return self.samples[name].median

    def has(self, name: str) -> bool:
        return name in self.samples

    def summaries(self) -> dict[str, Any]:
        return {name: samples.summary() for name, samples in sorted(self.samples.items())}
