"""One directory on durable storage, whatever keeps it: the few operations that persisting needs.

:func:`open_place` chooses by the URL's scheme. Names are relative and use '/'. Every operation raises errors of ours only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from backstay.errors import BackstayError, ConfigError
from backstayd.durable.verified_source import ShardSource

MIN_RANGE_BYTES: Final = 8 * 1024 * 1024  # a request of less costs a remote store as much
MAX_SMALL_BYTES: Final = 256 * 1024 * 1024  # manifests and records


@dataclass(frozen=True, slots=True)
class Entry:
    """What lies directly in a directory; ``size_bytes`` is -1 for a directory."""

    name: str
    size_bytes: int

    @property
    def is_directory(self) -> bool:
        return self.size_bytes < 0


class Place(Protocol):
    """A directory that need not exist yet."""

    url: str
    is_remote: bool  # many requests at once pay

    def list(self, name: str = "") -> list[Entry]:
        """What lies in the directory ``name``; nothing if it is not there."""

    def read_small(self, name: str) -> bytes:
        """A whole small file; raises SnapshotNotFoundError (``gone``) without one."""

    def size_of(self, name: str) -> int | None:
        """Bytes of a file; None without one."""

    def open_read(self, name: str) -> RangeReader:
        """Ranges of a file; raises SnapshotNotFoundError (``gone``) without one."""

    def put_shard(self, name: str, source: ShardSource, *, mark: str) -> bool:
        """Write ``source`` as ``name``, whole or not at all, going on where an earlier call under ``mark`` was cut off.

        False: something of that name was there, and stays as it is.
        """

    def put_small(self, name: str, data: bytes) -> None:
        """Write or replace a small file, whole or not at all."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless it exists, atomically where the store can; whether it was written. Where the store
        cannot, two that write at once may both have: read it to know whose is there."""

    def remove(self, name: str) -> None:
        """Remove a file; fine if it is not there."""

    def remove_tree(self, name: str, *, check: Callable[[], None] = lambda: None) -> None:
        """Remove a directory, what lies in it and uploads to it that never ended; fine if it is not there.

        ``check`` is called before each change that others could notice; it raises to end it there.
        """

    def require_root(self) -> None:
        """Raise UnavailableError (``no_root``) unless this directory or bucket exists."""


class RangeReader(Protocol):
    """An open file. Close it."""

    size_bytes: int

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``; raises IntegrityError when the file ends before."""

    def close(self) -> None: ...


def open_place(url: str) -> Place:
    """The directory at ``url``; touches nothing yet.

    Raises:
        ConfigError: for a scheme that is not known here, or one whose package is not installed.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        from backstayd.durable.local_place import LocalPlace

        return LocalPlace(url)
    try:
        filesystem, path = _filesystem(url)
    except ImportError as error:
        raise missing_package(url, scheme, error) from error
    except ValueError as error:
        raise ConfigError(
            f"persist_url {url}: the scheme {scheme!r} is not known ({error}); use file://, s3:// or one that the "
            "installed fsspec knows",
            reason="unknown_scheme",
        ) from error
    except BackstayError:
        raise
    except Exception as error:
        raise ConfigError(f"persist_url {url} cannot be opened: {error}", reason="bad_url") from error
    if scheme in ("s3", "s3a"):
        from backstayd.durable.s3_place import S3Place

        return S3Place(url, filesystem, path)
    from backstayd.durable.fsspec_place import FsspecPlace

    return FsspecPlace(url, filesystem, path)


def scheme_of(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    return scheme if separator else "file"


def missing_package(url: str, scheme: str, error: ImportError) -> ConfigError:
    """What to install."""
    extra = "s3" if scheme in ("s3", "s3a") else "storage"
    found = f" ({error})" if str(error) else ""
    return ConfigError(
        f"persist_url {url} needs a package that is not installed{found}: pip install 'backstay[{extra}]' on every node",
        reason="missing_package",
    )


_S3_OPTIONS: Final[dict[str, Any]] = {
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 32,
        "retries": {"max_attempts": 3, "mode": "standard"},
    },
}


def _filesystem(url: str) -> tuple[Any, str]:
    fsspec_core = importlib.import_module("fsspec.core")
    options = _S3_OPTIONS if scheme_of(url) in ("s3", "s3a") else {}
    filesystem, path = fsspec_core.url_to_fs(url, use_listings_cache=False, **options)
    return filesystem, path.rstrip("/")
