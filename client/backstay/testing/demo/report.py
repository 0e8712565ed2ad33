"""The demo's report: a table of the faults, the verdict, and the same as JSON with stable keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from backstay.testing.demo.injection import FaultRecord
from backstay.testing.demo.notes import Comparison, Shrinkage
from backstay.testing.demo.scenario import Scenario

_HEADINGS: Final = (
    "fault",
    "at step",
    "detected",
    "outcome",
    "source of ranks' shards",
    "rebuilt",
    "restored to",
    "lost",
    "resumed after",
)


@dataclass(slots=True, kw_only=True)
class Report:
    """The results of one demo. ``bitwise_equal`` is None if there was nothing to compare."""

    scenario: Scenario
    bitwise_equal: bool | None = None
    verdict: str = ""
    faults: list[FaultRecord] = field(default_factory=list)
    comparison: Comparison | None = None
    shrinkage: Shrinkage | None = None
    control_s: float = 0.0
    protected_s: float = 0.0
    stolen_core_s: float = 0.0
    timeline: list[dict[str, Any]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The report as JSON values; existing keys are stable."""
        scenario = {
            key: str(value) if isinstance(value, Path) else value for key, value in asdict(self.scenario).items()
        }
        return {
            "format": 1,
            "bitwise_equal": self.bitwise_equal,
            "verdict": self.verdict,
            "first_difference": self.comparison.first_difference if self.comparison else None,
            "compared": asdict(self.comparison) if self.comparison else None,
            "shrunk": asdict(self.shrinkage) if self.shrinkage else None,
            "faults": [asdict(record) | {"rebuilt_count": record.rebuilt_count} for record in self.faults],
            "scenario": scenario,
            "control_s": round(self.control_s, 2),
            "protected_s": round(self.protected_s, 2),
            "stolen_core_s": round(self.stolen_core_s, 2),
            "timeline": self.timeline,
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.document(), indent=1) + "\n")

    def table(self) -> str:
        """The faults, one per row."""
        rows = [_row(record) for record in self.faults]
        return _aligned([_HEADINGS, *rows])


def _row(record: FaultRecord) -> tuple[str, ...]:
    restored = "-" if record.restored_step is None else f"step {record.restored_step}"
    lost = "-" if record.steps_lost is None else f"{record.steps_lost} steps"
    return (
        record.what,
        str(record.injected_at_step),
        _seconds(record.detected_s),
        record.outcome,
        record.source_text() or "-",
        f"{record.rebuilt_count} shards" if record.rebuilt_count else "-",
        restored,
        lost,
        _seconds(record.recovered_s),
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def stolen_core_seconds() -> float:
    """Core-seconds the host took from this machine since boot (steal of /proc/stat)."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(fields[8]) / 100.0 if len(fields) > 8 else 0.0
