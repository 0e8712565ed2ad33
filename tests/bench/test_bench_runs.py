"""The benchmark runs end to end at a tiny size and fills every stable key; nothing here asserts speed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from backstay.errors import UsageError
from bench import arguments, report
from bench.__main__ import main
from bench.measure import Collection, MeasurementError, stolen_cpu_s
from tests.kit.wording import refuses


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in _numbers(item)]
    return [float(value)]


@pytest.mark.cluster
def test_a_quick_run_fills_every_key_with_a_positive_finite_number(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"

    status = main(["--quick", "--size", "2MiB", "--protect-nodes", "3", "--parity", "1", "--json", str(path)])

    assert status == 0
    result = json.loads(path.read_text())
    assert set(result) == {"format", "ratios", "bars", "raw", "machine"}
    own = {key for keys in report.OWN_KEYS.values() for key in keys}
    assert own <= set(result["ratios"])
    for peers in report.PEER_KEYS.values():
        for peer, keys in peers.items():
            assert set(keys) <= set(result["ratios"][peer])
    assert all(math.isfinite(number) and number > 0 for number in _numbers(result["ratios"]))
    assert all({"value", "is_met"} < set(bar) for bar in result["bars"].values())
    for name, samples in result["raw"].items():
        assert samples["min"] <= samples["median"] <= samples["max"], name
        assert samples["rounds"] >= 1
        assert samples["stolen_cpu_s"] >= 0
    assert list(Path("/dev/shm").glob(f"backstay*-{os.getpid()}-*")) == []


def test_a_measurement_that_was_not_made_is_an_error_and_not_a_number() -> None:
    settings = arguments.parse(["--quick", "--parts", "protect", "--no-peers"])
    found = Collection()
    found.add("protect_vs_tcp", 0.2, unit="ratio")

    with refuses(MeasurementError, "no_samples", "rebuild_vs_tcp"):
        report.build(settings, found)


def test_a_bar_says_its_limit_the_value_and_whether_it_was_met() -> None:
    settings = arguments.parse(["--quick", "--parts", "protect", "--no-peers"])
    found = Collection()
    for key, values in {
        "protect_vs_tcp": (0.1, 0.2, 0.3),
        "rebuild_vs_tcp": (0.01,),
        "memory_vs_state": (3.1,),
    }.items():
        for value in values:
            found.add(key, value, unit="ratio", stolen_s=0.5)

    result = report.build(settings, found)

    assert result["ratios"] == {"protect_vs_tcp": 0.2, "rebuild_vs_tcp": 0.01, "memory_vs_state": 3.1}
    assert result["bars"]["protect_vs_tcp"] == {"at_least": 0.12, "value": 0.2, "is_met": True}
    assert result["bars"]["rebuild_vs_tcp"]["is_met"] is False
    assert result["bars"]["memory_vs_state"] == {"at_most": 3.15, "value": 3.1, "is_met": True}
    assert result["raw"]["protect_vs_tcp"]["rounds"] == 3
    assert result["raw"]["protect_vs_tcp"]["stolen_cpu_s"] == 1.5
    assert "MISSED" in report.table(result, found)


def test_a_ratio_that_is_not_finite_and_positive_fails_the_run() -> None:
    with refuses(MeasurementError, "bad_value", "dcp_save.block_ms", "inf"):
        report.check_finite({"ratios": {"block_ms": 1.0, "dcp_save": {"block_ms": math.inf}}})


def test_an_unknown_part_is_refused_with_the_parts_there_are() -> None:
    with refuses(UsageError, "bad_part", "'triple'", "solo", "protect"):
        arguments.parse(["--parts", "solo,triple"])


def test_stolen_cpu_time_never_runs_backwards() -> None:
    first = stolen_cpu_s()
    assert 0.0 <= first <= stolen_cpu_s()
