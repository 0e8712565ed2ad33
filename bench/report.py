"""The benchmark's result: ratios under stable keys, their bars, the raw samples and the machine; as a table and JSON.

Bars are reported, never asserted: a busy machine misses them although nothing is broken.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from bench.arguments import Settings
from bench.measure import Collection, MeasurementError

OWN_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "solo": ("commit_vs_memcpy", "commit_vs_memcpy_busy", "restore_vs_memcpy"),
    "frozen": ("frozen_cost", "frozen_cpu", "frozen_bytes"),
    "pair": ("block_ms", "step_overhead_waiting", "step_overhead_cpu"),
    "protect": ("protect_vs_tcp", "rebuild_vs_tcp", "memory_vs_state"),
    "reshard": ("reshard_moved_vs_needed", "reshard_vs_tcp"),
    "persist": ("persist_vs_cp", "persisted_restore_vs_dcp_load", "step_overhead_persisting"),
    "rest": ("rest_cores", "rest_mib", "rest_coordinator_cores", "rest_coordinator_mib"),
}
PEER_KEYS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "solo": {
        "dcp_save": ("commit_vs_memcpy",),
        "dcp_async_save": ("commit_vs_memcpy",),
        "dcp_load": ("restore_vs_memcpy",),
    },
    "pair": {
        "dcp_save": ("block_ms", "step_overhead_waiting", "step_overhead_cpu", "memory_vs_state"),
        "dcp_async_save": ("block_ms", "step_overhead_waiting", "step_overhead_cpu", "memory_vs_state"),
    },
}
_MEANING: Final = {
    "block_ms": "time snapshot() blocks, steps that wait (ms)",
    "step_overhead_waiting": "step time with a snapshot every step / without, steps that wait",
    "step_overhead_cpu": "the same, CPU-bound steps",
    "commit_vs_memcpy": "capture + digest + commit / one-thread memcpy, a core to spare",
    "commit_vs_memcpy_busy": "the same, the other core busy",
    "restore_vs_memcpy": "load from local memory / one-thread memcpy",
    "frozen_cost": "commit with 99 % of parameters frozen / without, same size",
    "frozen_cpu": "CPU seconds of the trainer for it, the same",
    "frozen_bytes": "bytes copied and digested for it, the same",
    "protect_vs_tcp": "state protected per second, all nodes / raw TCP",
    "rebuild_vs_tcp": "lost shards rebuilt per second / raw TCP",
    "memory_vs_state": "tmpfs held / state",
    "reshard_moved_vs_needed": "4 ranks' state into 3 from memory: bytes moved / bytes needed",
    "reshard_vs_tcp": "the same: state read per second, all ranks / raw TCP",
    "persist_vs_cp": "durable copy to a disk / cp and sync to it",
    "persisted_restore_vs_dcp_load": "dcp.load from a disk / whole restore() from a copy on it, nothing in memory",
    "step_overhead_persisting": "steps that wait, copying all the time / without copies",
    "rest_cores": "node that holds a run while nobody trains: share of a core",
    "rest_mib": "the same: memory besides the arena (MiB)",
    "rest_coordinator_cores": "its coordinator: share of a core",
    "rest_coordinator_mib": "its coordinator: memory (MiB)",
}


def bars(settings: Settings) -> dict[str, dict[str, Any]]:
    """The promised limits, by key: the value must be ``at_most`` or ``at_least`` that."""
    data = settings.protect_nodes - settings.parity
    return {
        "block_ms": {"at_most": 10.0},
        "step_overhead_waiting": {"at_most": 1.05},
        "commit_vs_memcpy": {"at_least": 0.7},
        "commit_vs_memcpy_busy": {"at_least": 0.55},
        "restore_vs_memcpy": {"at_least": 0.7},
        "frozen_cost": {"at_most": 0.05},
        "frozen_cpu": {"at_most": 0.05},
        "frozen_bytes": {"at_most": 0.05},
        "protect_vs_tcp": {"at_least": 0.12},
        "rebuild_vs_tcp": {"at_least": 0.12},
        "reshard_moved_vs_needed": {"at_most": 1.05},
        "reshard_vs_tcp": {"at_least": 0.2},
        "persist_vs_cp": {"at_least": 0.8},
        "persisted_restore_vs_dcp_load": {"at_least": 1.0},
        "step_overhead_persisting": {"at_most": 1.02},
        "rest_cores": {"at_most": 0.01},
        "rest_mib": {"at_most": 100.0},
        "memory_vs_state": {"at_most": round(1.05 * 2 * (1 + settings.parity / data), 4)},
    }


def build(settings: Settings, found: Collection) -> dict[str, Any]:
    """The report; raises MeasurementError if a key of a part that ran was not measured."""
    ratios: dict[str, Any] = {}
    for part in settings.parts:
        for key in OWN_KEYS[part]:
            ratios[key] = found.median(key)
        if settings.has_peers:
            for peer, keys in PEER_KEYS.get(part, {}).items():
                ratios.setdefault(peer, {}).update({key: found.median(f"{peer}.{key}") for key in keys})
    judged = {}
    for key, bar in bars(settings).items():
        if key in ratios:
            is_met = ratios[key] <= bar["at_most"] if "at_most" in bar else ratios[key] >= bar["at_least"]
            judged[key] = {**bar, "value": ratios[key], "is_met": is_met}
    return {"format": 1, "ratios": ratios, "bars": judged, "raw": found.summaries(), "machine": machine(settings)}


def machine(settings: Settings) -> dict[str, Any]:
    """The machine and the settings of the measurement."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "size_bytes": settings.size_bytes,
        "protect_size_bytes": settings.protect_size_bytes,
        "ranks": settings.ranks,
        "protect_nodes": settings.protect_nodes,
        "parity": settings.parity,
        "rounds": settings.rounds,
    }


def table(report: dict[str, Any], found: Collection) -> str:
    """A text table: each figure with its spread, the CPU time stolen meanwhile, its bar, and the alternatives' figures."""
    lines = [f"{'':62}{'median':>9}{'min':>9}{'max':>9}{'n':>4}{'stolen':>8}  bar"]
    for key, meaning in _MEANING.items():
        if not found.has(key) or key not in report["ratios"]:
            continue
        lines.append(_row(meaning, found, key) + _bar(report["bars"].get(key)))
        for peer in ("dcp_save", "dcp_async_save", "dcp_load"):
            if found.has(f"{peer}.{key}"):
                lines.append(_row(f"    {peer.replace('dcp_', 'dcp.')}", found, f"{peer}.{key}"))
    for name, samples in sorted(found.samples.items()):
        if samples.unit == "bytes/s":
            lines.append(f"{name:62}{samples.median / 1e9:9.2f} GB/s")
    return "\n".join(lines)


def _row(label: str, found: Collection, name: str) -> str:
    one = found.samples[name]
    spread = f"{one.median:9.3f}{min(one.values):9.3f}{max(one.values):9.3f}{len(one.values):4}{one.stolen_s:7.1f}s"
    return f"{label:62}{spread}  "


def _bar(bar: dict[str, Any] | None) -> str:
    if bar is None:
        return ""
    limit = f"<= {bar['at_most']:g}" if "at_most" in bar else f">= {bar['at_least']:g}"
    return f"{limit:8} {'met' if bar['is_met'] else 'MISSED'}"


def check_finite(report: dict[str, Any]) -> None:
    """Raise MeasurementError if any ratio is not a positive finite number."""
    flat = [(key, value) for key, value in report["ratios"].items() if not isinstance(value, dict)]
    flat += [
        (f"{peer}.{key}", v)
        for peer, keys in report["ratios"].items()
        if isinstance(keys, dict)
        for key, v in keys.items()
    ]
    for key, value in flat:
        if not 0 < value < float("inf"):
            raise MeasurementError(f"{key} came out as {value}", reason="bad_value")
