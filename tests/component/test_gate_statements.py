"""What four ranks state of the same model in every wrapping: they agree, see one changed bit, and need no collective for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from backstay.protocol.messages import GateEntry
from backstay.restore.gate_statements import WINDOW_BYTES, crc_of
from backstayd.core.messages.gate import GateReport
from backstayd.core.recover.gate import Conflict, conflicts_of
from tests.kit import statement_ranks
from tests.kit.forked_ranks import run_script
from tests.kit.local_daemon import LocalDaemon
from tests.kit.statement_ranks import KINDS, RANKS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """By kind, and by rank, what the script wrote."""
    out = tmp_path_factory.mktemp("statements")
    with LocalDaemon() as daemon:
        run_script(statement_ranks.__file__, daemon.socket_path, out)
        yield {kind: [json.loads((out / f"{kind}-{r}.json").read_text()) for r in range(RANKS)] for kind in KINDS}


def conflicts(found: dict[str, list[dict[str, Any]]], kind: str, variant: str) -> list[Conflict]:
    reports = {
        rank: GateReport(
            decision_id="d",
            entries=tuple(
                GateEntry(name=e["name"], ranks=tuple(e.get("ranks", ())), digest=e["digest"]) for e in of_rank[variant]
            ),
        )
        for rank, of_rank in enumerate(found[kind])
    }
    assert all(report.entries for report in reports.values())
    return conflicts_of(reports, range(RANKS))


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_restored_the_same_snapshot_agree_on_everything(
    found: dict[str, list[dict[str, Any]]], kind: str
) -> None:
    assert conflicts(found, kind, "clean") == []
    names = {entry["name"].partition(":")[0] for entry in found[kind][0]["clean"]}
    assert {"identity", "layout", "steps", "rng"} <= names


@pytest.mark.parametrize("kind", KINDS)
def test_restore_has_one_collective_and_the_gate_none(found: dict[str, list[dict[str, Any]]], kind: str) -> None:
    for of_rank in found[kind]:
        assert set(of_rank["collectives"]) <= {"send.default", "recv_.default"}, "the world id, and no collective"


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_that_differs_between_replicas_is_seen_where_there_are_replicas(
    found: dict[str, list[dict[str, Any]]], kind: str
) -> None:
    seen = conflicts(found, kind, "bit")
    expected = {"ddp": ["replicas: all ranks"], "hsdp": ["replicas: ranks 1, 3"]}.get(kind, [])
    assert [conflict.name for conflict in seen] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_counter_that_differs_between_ranks_that_share_a_parameter_is_seen(
    found: dict[str, list[dict[str, Any]]], kind: str
) -> None:
    seen = [conflict.name for conflict in conflicts(found, kind, "steps")]
    assert "steps: all ranks" in seen


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ddp"])
def test_a_statistic_of_each_ranks_own_part_may_differ(found: dict[str, list[dict[str, Any]]], kind: str) -> None:
    assert conflicts(found, kind, "statistic") == []


def test_a_replica_of_another_model_is_seen(found: dict[str, list[dict[str, Any]]]) -> None:
    names = [conflict.name for conflict in conflicts(found, "ddp", "model")]
    assert "layout: all ranks" in names


@pytest.mark.parametrize("kind", KINDS)
def test_moments_that_are_missing_are_refused_by_the_rank_itself(
    found: dict[str, list[dict[str, Any]]], kind: str
) -> None:
    assert "optimizer.state.0.weight.exp_avg is missing" in found[kind][RANKS - 1]["moments"]
    assert isinstance(found[kind][0]["moments"], list)


def test_the_digest_of_a_tensor_depends_on_its_elements_and_not_on_how_they_lie() -> None:
    whole = torch.arange(WINDOW_BYTES // 4 * 2 + 12, dtype=torch.float32).view(-1, 4)
    turned = whole.t().contiguous().t()
    assert not turned.is_contiguous()
    assert crc_of(turned) == crc_of(whole)
    assert crc_of(whole.to(torch.complex64)) != crc_of(whole)
    changed = turned.clone()
    changed[7, 2] += 1
    assert crc_of(changed) != crc_of(whole)
    assert crc_of(torch.tensor(3.0)) == crc_of(torch.tensor([3.0]))
