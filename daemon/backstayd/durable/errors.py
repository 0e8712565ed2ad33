"""What durable storage answers, in sentences for the person who runs it: what failed, where, and the next step.

Knows the errors of the kernel, of fsspec's file systems and of S3; raises nothing itself.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from backstay.errors import BackstayError, CapacityError, SnapshotNotFoundError, UnavailableError

NO_PERMISSION: Final = "no_permission"
BAD_CREDENTIALS: Final = "bad_credentials"
NO_ROOT: Final = "no_root"
NO_SPACE: Final = "no_space"
UNREACHABLE: Final = "unreachable"
GONE: Final = "gone"

_CREDENTIAL_CODES = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "InvalidSecurity", "TokenRefreshRequired"}
)  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def explained(what: str, url: str) -> Iterator[None]:
    """Turn whatever ``what`` at ``url`` fails with into an error of ours."""
    try:
        yield
    except BackstayError:
        raise
    except Exception as error:  # the boundary to foreign file systems, which raise what they like
        raise explain(error, what, url) from error


def explain(error: Exception, what: str, url: str) -> BackstayError:
    """The error of ours for ``error``; the message ends with what to do."""
    code, place = s3_code(error), f"cannot {what} {url}"
    number = error.errno if isinstance(error, OSError) else None
    if code == "NoSuchBucket":
        return UnavailableError(f"{place}: its bucket does not exist; create it or correct persist_url", reason=NO_ROOT)
    if code in _CREDENTIAL_CODES or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return UnavailableError(
            f"{place}: the credentials are missing or not accepted ({code or error}); give the daemon valid ones in its "
            "environment and restart it",
            reason=BAD_CREDENTIALS,
        )
    if isinstance(error, PermissionError) or number in _DENIED or code in ("AccessDenied", "403"):
        return UnavailableError(
            f"{place}: {_short(error) or 'permission denied'}; let the user that runs backstayd read and write there",
            reason=NO_PERMISSION,
        )
    if number in _FULL:
        return CapacityError(f"{place}: {_short(error)}; free room there or lower persist_keep_last", reason=NO_SPACE)
    if isinstance(error, FileNotFoundError) or code in ("NoSuchKey", "404", "NoSuchUpload"):
        return SnapshotNotFoundError(f"{place}: it is not there", reason=GONE)
    return UnavailableError(
        f"{place}: {code + ': ' if code else ''}{_short(error)}; the store must answer before this can go on",
        reason=UNREACHABLE,
    )


def s3_code(error: BaseException | None) -> str:
    """The code of the S3 answer behind ``error``; "" if there is none."""
    for _ in range(8):
        if error is None:
            return ""
        response = getattr(error, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            return str(response["Error"].get("Code", ""))
        error = error.__cause__ or error.__context__
    return ""


def _short(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return " ".join(text.split())[:300]
