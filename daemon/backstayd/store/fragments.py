"""Writing a parity fragment on this node: bytes into a temporary file, renamed, then its commit record.

Accepted only while the plan is stored here: a plan that was dropped takes no late fragment.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from backstay.errors import IntegrityError, UnavailableError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES
from backstayd.store.paths import FragmentRef, RunPaths
from backstayd.store.record_files import (
    StoredFragment,
    create_exclusively,
    storage_error,
    temporary_path,
    write_atomically,
)


class FragmentWriter:
    """Takes the chunks of one fragment in order, each verified by the caller; ``commit`` publishes, ``abort`` removes."""

    def __init__(
        self,
        paths: RunPaths,
        ref: FragmentRef,
        *,
        size_bytes: int,
        incarnation: str,
    ) -> None:
        """Raises UnavailableError (``not_ready``) while the plan is not stored here."""
        key, plan_id = ref.key, ref.plan_id
        self._plan_path = paths.plan(key, plan_id)
        self._check_plan()
        self._path = paths.fragment(key, plan_id, stripe=ref.stripe, index=ref.index)
        self._record_path = paths.fragment_record(key, plan_id, stripe=ref.stripe, index=ref.index)
        self._incarnation = incarnation
        self._record = StoredFragment(
            run=ref.run,
            attempt=key.attempt,
            step=key.step,
            plan_id=plan_id,
            stripe=ref.stripe,
            index=ref.index,
            size_bytes=size_bytes,
        )
        self._crcs: list[str] = []
        self._temporary = temporary_path(self._path, incarnation)
        self._fd = create_exclusively(self._temporary)

    @property
    def chunk_count(self) -> int:
        return self._record.chunk_count

    def chunk_length(self, index: int) -> int:
        return self._record.chunk_length(index)

    def write(self, crc: int, pieces: Sequence[memoryview]) -> None:
        """Write the next chunk, whose crc32c is ``crc``. Raises CapacityError without room."""
        chunk = len(self._crcs)
        try:
            written = os.pwritev(self._fd, pieces, chunk * CHUNK_BYTES)
        except OSError as error:
            raise storage_error(self._path, error) from error
        if written != self._record.chunk_length(chunk):
            raise IntegrityError(f"{self._path.name}: {written} bytes written as chunk {chunk}")
        self._crcs.append(f"{crc:08x}")

    def commit(self) -> StoredFragment:
        """Publish the bytes by rename, then their record. Raises UnavailableError when the plan was dropped meanwhile."""
        if len(self._crcs) != self._record.chunk_count:
            raise IntegrityError(f"{self._path.name}: {len(self._crcs)} of {self._record.chunk_count} chunks written")
        self._close()
        self._check_plan()
        self._record = replace(self._record, chunk_crcs="".join(self._crcs))
        self._record_path.unlink(missing_ok=True)  # no record may stand beside bytes it does not describe
        try:
            self._temporary.rename(self._path)
        except OSError as error:
            raise storage_error(self._path, error) from error
        write_atomically(self._record_path, json_records.dumps(self._record), incarnation=self._incarnation)
        return self._record

    def abort(self) -> None:
        """Remove what was written; idempotent, harmless after commit."""
        self._close()
        self._temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _check_plan(self) -> None:
        if not self._plan_path.exists():
            raise UnavailableError(f"{self._plan_path.name} is not stored here", reason="not_ready")
