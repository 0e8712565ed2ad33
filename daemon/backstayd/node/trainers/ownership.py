"""Whose run it is, on a node: what the coordinator says, else who attached here first. Decides nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from backstay.errors import UsageError
from backstayd.node.node_state import NodeContext
from backstayd.store.index import UNKNOWN_UID


def check_owner(context: NodeContext, run: str, uid: int) -> None:
    """Raise UsageError (``not_owner``) if ``run`` is known to be another user's than ``uid``."""
    owner = context.run_desired(run).owner
    index = context.store.runs.get(run)
    if not owner and index is not None and index.owner_uid != UNKNOWN_UID:
        owner = str(index.owner_uid)
    if owner and owner != str(uid):
        raise UsageError(
            f"run {run} belongs to user {owner}, not to user {uid}; choose another run_id, or another job name",
            reason="not_owner",
        )


def adopt_owner(context: NodeContext, run: str, owner: str, *, has_memory: Callable[[], bool]) -> None:
    """Keep what the coordinator says beside what lies here of ``run``, so that the next one hears it from this node too.

    A claim of somebody whose name alone lies here is struck out; memory of another user's history is left to that user.
    """
    index = context.store.runs.get(run)
    if not owner or index is None or index.owner_uid == int(owner):
        return
    is_unclaimed = index.owner_uid == UNKNOWN_UID
    if is_unclaimed == has_memory():  # unclaimed memory, or a claim without any
        context.store.write_owner(run, int(owner))
        index.owner_uid = int(owner)


def document_for(context: NodeContext, uid: int) -> dict[str, Any]:
    """The status document without what is other users'; root and the daemon's own user see all."""
    document = context.document()
    if uid in (0, os.geteuid()):
        return document
    own = {"", *(run for run, index in context.store.runs.items() if index.owner_uid in (uid, UNKNOWN_UID))}
    shown = {name: [item for item in document[name] if item["run"] in own] for name in ("runs", "timeline")}
    return document | shown | {"foreign": []}
