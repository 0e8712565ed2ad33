"""Files that appear whole, and directories in which a failure leaves nothing. Knows nothing of what is written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from backstay.errors import CapacityError


@contextlib.contextmanager
def leaving_nothing(what: str, directory: Path) -> Iterator[list[Path]]:
    """Make ``directory``; the files of ``what`` that are put on the list are removed if writing fails.

    Raises:
        CapacityError: instead of an OSError from inside.
    """
    made: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield made
    except BaseException as error:
        for path in made:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CapacityError(
                f"cannot write the {what} to {directory}: {error.strerror or error}; nothing is left there",
                reason="no_space",
            ) from error
        raise


@contextlib.contextmanager
def appearing_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that is at ``path``, by rename, once it is on the disk; nothing is left of it if writing fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            settle(file)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def settle(file: BinaryIO) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())
