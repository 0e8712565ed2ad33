"""Ranks that are only some of torch.distributed's train and restore under their own run; others are told by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import backstay
from backstay.errors import UsageError
from tests.kit import group_ranks
from tests.kit.forked_ranks import run_script
from tests.kit.group_ranks import GROUPS, RANKS
from tests.kit.local_daemon import LocalDaemon


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    """By rank of torch.distributed."""
    out = tmp_path_factory.mktemp("groups")
    with LocalDaemon() as daemon:
        run_script(group_ranks.__file__, daemon.socket_path, out)
        yield [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("kind", sorted(GROUPS))
def test_the_ranks_of_a_group_are_a_world_of_their_own_and_come_back_where_they_were(
    found: list[dict[str, Any]], kind: str
) -> None:
    for rank in GROUPS[kind]:
        assert found[rank]["outcomes"] == ["NONE", "EXACT"]
        assert found[rank]["step"] == 3
        assert found[rank]["restored"] == found[rank]["trained"]
    first, second = (found[rank]["trained"] for rank in GROUPS[kind])
    assert first != second, "each rank has state of its own"


def test_a_model_on_ranks_outside_of_the_group_is_refused_with_both(found: list[dict[str, Any]]) -> None:
    for kind, ranks in GROUPS.items():
        for rank in ranks:
            words = found[rank]["foreign_model"]
            assert "is spread over ranks 0, 1, 2, 3 of torch.distributed" in words
            assert f"process_group has only {ranks[0]}, {ranks[1]}" in words, kind


def test_a_process_that_is_not_of_the_group_and_what_is_no_group_are_refused(found: list[dict[str, Any]]) -> None:
    assert {of_rank["not_in_group"] for of_rank in found} == {"not_in_group"}
    model = torch.nn.Linear(1, 1)
    with pytest.raises(UsageError, match="process_group is"):
        backstay.Snapshotter(model, torch.optim.SGD(model.parameters()), run_id="r", process_group="all")
