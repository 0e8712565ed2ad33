"""Choosing what keeps a directory of durable storage, by the scheme of its URL. Packages are imported when a URL needs them."""

from __future__ import annotations

import importlib
from typing import Any, Final

from backstay.errors import BackstayError, ConfigError
from backstayd.durable.fsspec_place import FsspecPlace
from backstayd.durable.local_place import LocalPlace
from backstayd.durable.place import Place
from backstayd.durable.s3_place import S3Place


def open_place(url: str) -> Place:
    """The directory at ``url``; touches nothing yet.

    Raises:
        ConfigError: for a scheme that is not known here, or one whose package is not installed.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        return LocalPlace(url)
    try:
        filesystem, path = _filesystem(url)
    except ImportError as error:
        raise _missing_package(url, scheme, error) from error
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
        return S3Place(url, filesystem, path)
    return FsspecPlace(url, filesystem, path)


def scheme_of(url: str) -> str:
    scheme, separator, _ = url.partition("://")
    return scheme if separator else "file"


def _missing_package(url: str, scheme: str, error: ImportError) -> ConfigError:
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
