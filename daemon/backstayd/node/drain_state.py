"""Whether this node is to be stopped (drained), recorded in a file of its memory directory.

Decides nothing: the coordinator says when the node may be stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from backstay.errors import BackstayError
from backstay.format import json_records
from backstayd.store.adopt import DRAINING_NAME
from backstayd.store.record_files import read_small, write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainRecord:
    """Contents of .draining.json: who wants the node drained."""

    by_operator: bool = False
    by_cordon: bool = False


class Drain:
    """Invariant: the next daemon on this memory directory starts with the same :attr:`is_draining`."""

    def __init__(self, memory_dir: Path, *, incarnation: str, on_change: Callable[[str], None]) -> None:
        self._path = memory_dir / DRAINING_NAME
        self._incarnation = incarnation
        self._record = DrainRecord()
        self._on_change = on_change
        try:
            self._record = json_records.loads(DrainRecord, read_small(self._path))
        except (BackstayError, OSError) as error:
            if self._path.exists():
                logger.error("cannot read %s, so this node counts as not draining: %s", self._path, error)

    @property
    def is_draining(self) -> bool:
        return self._record.by_operator or self._record.by_cordon

    @property
    def is_cordoned(self) -> bool:
        return self._record.by_cordon

    def obey(self, drain: bool | None) -> None:
        """Carry out an order of the operator; None: no order."""
        if drain is not None:
            self._keep(replace(self._record, by_operator=drain))

    def set_cordoned(self, is_cordoned: bool) -> None:
        """Follow the Kubernetes node."""
        self._keep(replace(self._record, by_cordon=is_cordoned))

    def _keep(self, wanted: DrainRecord) -> None:
        if wanted == self._record:
            return
        try:
            if wanted == DrainRecord():
                self._path.unlink(missing_ok=True)
            else:
                write_atomically(self._path, json_records.dumps(wanted), incarnation=self._incarnation)
        except OSError as error:
            logger.error("cannot record in %s whether this node drains: %s; trying again", self._path, error)
            return
        self._record = wanted
        who = "an operator's order" if wanted.by_operator else "the cordon of its Kubernetes node"
        self._on_change(f"this node drains: {who}" if self.is_draining else "this node no longer drains")
