"""A node and storage that others share: it records, removes and marks only what the coordinator wanted a moment ago."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from backstay.format import json_records
from backstay.ids import SnapshotKey, snapshot_id
from backstayd.core.inventory.durable_names import MARKS_NAME, RECORD_NAME, snapshot_name
from backstayd.core.messages.decisions import Distrusted, Lineage
from backstayd.core.messages.desired import RunDesired
from backstayd.core.messages.durable import PersistedSnapshot, StorageDesired, UploadTask
from backstayd.core.messages.plans import VolumeShard
from backstayd.core.messages.report import RunReport
from backstayd.core.protect.durable_upkeep import stored
from tests.kit.node import NodeThread, running_node
from tests.kit.shards import RUN

LEASE_S = 2.0


def persisted(step: int) -> PersistedSnapshot:
    digest = f"{step:04x}".ljust(64, "a")
    return PersistedSnapshot(
        run=RUN, attempt=1, step=step, world_size=1, serial=step,
        snapshot_id=snapshot_id(key=SnapshotKey(1, step), world_size=1, shard_digests=[digest]),
        shards=(VolumeShard(rank=0, size_bytes=4, digest=digest),),
        lineage=(Lineage(attempt=1, base_attempt=0, base_step=0),),
    )  # fmt: skip


def put(root: Path, item: PersistedSnapshot) -> Path:
    directory = root / RUN / snapshot_name(item.key)
    directory.mkdir(parents=True)
    (directory / RECORD_NAME).write_bytes(json_records.dumps(item))
    return directory


def until(condition: Callable[[], object], why: str, deadline_s: float = 30.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"still not after {deadline_s} s: {why}"
        time.sleep(0.02)


def report(node: NodeThread) -> RunReport:
    return next((run for run in node.report().runs if run.run == RUN), RunReport(run=RUN))


def desired(root: Path, survey_id: str) -> RunDesired:
    """Remove step 1, mark step 3, record step 4 (which is incomplete), and list: what tells that a pass was made."""
    storage = StorageDesired(
        url=f"file://{root / RUN}", survey_id=survey_id, prunes=(stored(persisted(1)),), grounds=(stored(persisted(2)),),
        newest_attempt=1, distrust=(Distrusted(snapshot_id="c" * 64, attempt=1, step=3, reason="nan"),),
        uploads=(UploadTask(snapshot=persisted(4), is_last=True),),
    )  # fmt: skip
    return RunDesired(run=RUN, storage=storage)


def surveyed(node: NodeThread, survey_id: str) -> None:
    """Wait for the answer: a pass over all that is desired was made."""

    def is_done() -> bool:
        survey = report(node).survey
        return survey is not None and survey.is_done and survey.survey_id == survey_id

    until(is_done, f"survey {survey_id}")


def test_a_node_that_heard_nothing_for_a_lease_touches_nothing_that_others_share(
    tmpfs_dir: Path, tmp_path: Path
) -> None:
    root = tmp_path / "storage"
    old = put(root, persisted(1))
    put(root, persisted(2))
    with running_node(tmpfs_dir, lease_s=LEASE_S) as node:
        now_s = node.node.state.clock.boot_s
        node.call(lambda: node.node.state.store.index(RUN))  # it knows the run
        for survey_id in ("first", "second"):  # the answer is new, what it says may be a lease old
            node.desire(desired(root, survey_id), answered_s=now_s() - LEASE_S)
            surveyed(node, survey_id)
        assert old.exists()
        assert not (root / RUN / MARKS_NAME).exists()
        assert not report(node).uploads
        node.desire(desired(root, "third"))
        until(lambda: not old.exists(), "it is confirmed")
        until(lambda: report(node).pruned == (SnapshotKey(1, 1),), "and reported")
        until(lambda: report(node).marked == ("c" * 64,), "marks, too")
        until(lambda: any("not complete" in upload.reason for upload in report(node).uploads), "records, too")
        assert (root / RUN / snapshot_name(SnapshotKey(1, 2)) / RECORD_NAME).exists()


def test_what_an_older_coordinator_says_confirms_nothing(tmpfs_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "storage"
    old = put(root, persisted(1))
    put(root, persisted(2))
    with running_node(tmpfs_dir, lease_s=LEASE_S) as node:
        now_s = node.node.state.clock.boot_s
        node.call(lambda: node.node.state.store.index(RUN))  # it knows the run
        node.desire(desired(root, "first"), generation=5, answered_s=now_s() - LEASE_S)
        node.desire(desired(root, "older"), generation=4)
        node.desire(desired(root, "second"), generation=5, answered_s=now_s() - LEASE_S)
        surveyed(node, "second")
        assert old.exists()
