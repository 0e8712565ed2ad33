"""Which part of a path is a snapshot, and of which step."""

from __future__ import annotations

import pytest

from backstay.stores.folder_urls import folder_of, split_path


@pytest.mark.parametrize(
    ("name", "folder", "step"),
    [
        ("step-100/model.pt", "step-100", 100),
        ("step-100/shards/0/x", "step-100", 100),
        ("runs/global_step7/mp_rank_00/x", "runs/global_step7", 7),
        ("iter_0000100/x", "iter_0000100", 100),
        ("tmp-checkpoint-500/x", "tmp-checkpoint-500", 500),
        ("epoch=3-step=12/x", "epoch=3-step=12", 12),
        ("out/500/x", "out/500", 500),
        ("latest", "", None),
    ],
)
def test_a_folder_that_says_its_number_is_of_that_step(name: str, folder: str, step: int | None) -> None:
    assert folder_of(name) == (folder, step)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("llama3/final/x", "llama3"),
        ("llama-3/final/x", "llama-3"),
        ("final/source/subdir0/x", "final"),
        ("lightning_logs/version_0/checkpoints/epoch=0-step=2.ckpt", "lightning_logs"),
        ("final/shard-00001-of-00002/x", "final"),
    ],
)
def test_a_number_that_is_part_of_a_name_is_not_a_step(name: str, folder: str) -> None:
    assert folder_of(name) == (folder, None)


def test_a_path_begins_with_job_and_run() -> None:
    assert split_path("job/run/a/b") == ("job/run", "a/b")
    assert split_path("job/run") == ("job/run", "")
    assert split_path("job") == ("", "")
