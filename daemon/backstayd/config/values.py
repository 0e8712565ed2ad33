"""Parsers of single settings: each takes a value of TOML, the environment or a flag, and raises ValueError with a predicate.

The caller puts the place and the value in front of the predicate ("is not a number"). Must not know which setting it parses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

from backstay.errors import UsageError
from backstay.ids import check_name
from backstayd import addresses
from backstayd.election.stores import parse as parse_election

MAX_PARITY: Final = 4
MAX_SOCKET_PATH_BYTES: Final = 107  # sun_path of Linux, less its terminating zero

_LABEL = re.compile(r"[A-Za-z0-9._/:-]{0,100}\Z")
_TRUST_DOMAIN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,254}\Z")

Parser = Callable[[Any], Any]


def _parse_text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("is not a string")
    return value


def parse_name(value: Any) -> str:
    try:
        return check_name("name", _parse_text(value))
    except UsageError:
        message = "is not 1 to 100 letters, digits, '.', '_' or '-', starting with a letter or digit"
        raise ValueError(message) from None


def parse_label(value: Any) -> str:
    if not isinstance(value, str) or not _LABEL.match(value):
        raise ValueError("must be at most 100 letters, digits, '.', '_', '/', ':' or '-'")
    return value


def parse_trust_domain(value: Any) -> str:
    """``value`` if it is a valid trust domain; raises ValueError."""
    if not isinstance(value, str) or not _TRUST_DOMAIN_NAME.match(value):
        raise ValueError("is not 1 to 255 lower-case letters, digits, '.', '_' or '-', starting with a letter or digit")
    return value


def parse_path(value: Any) -> Path:
    path = Path(_parse_text(str(value) if isinstance(value, Path) else value))
    if not path.is_absolute():
        raise ValueError("is not an absolute path")
    return path


def parse_socket_path(value: Any) -> Path:
    path = parse_path(value)
    if len(str(path).encode()) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(f"is longer than the {MAX_SOCKET_PATH_BYTES} bytes that a Unix socket's path may have")
    return path


def parse_address(value: Any) -> str:
    return addresses.join_address(*addresses.split_address(_parse_text(value)))


def parse_addresses(value: Any) -> str:
    return ",".join(addresses.split_addresses(_parse_text(value)))


def parse_reachable_address(value: Any) -> str:
    host, _ = addresses.split_address(_parse_text(value))
    if addresses.is_wildcard(host):
        raise ValueError("is a wildcard; this address is announced to peers, so use one that they can reach")
    return parse_address(value)


def parse_optional_address(value: Any) -> str:
    return parse_reachable_address(value) if value != "" else ""


def parse_election_url(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a string")
    if value:
        parse_election(value)
    return value


def parse_seconds(value: Any) -> float:
    seconds = _parse_number(float, value)
    if not (math.isfinite(seconds) and 0.1 <= seconds <= 3600):
        raise ValueError("is not a number of seconds from 0.1 to 3600")
    return seconds


def parse_ttl(value: Any) -> float:
    seconds = _parse_number(float, value)
    if not (seconds == 0 or 1 <= seconds <= 366 * 86400):
        raise ValueError("is neither 0 nor a number of seconds from 1 to a year")
    return seconds


def count_between(low: int, high: int) -> Parser:
    def parse(value: Any) -> int:
        count = _parse_number(int, value)
        if not low <= count <= high:
            raise ValueError(f"is not a number from {low} to {high}")
        return count

    return parse


def parse_parity(value: Any) -> int | None:
    if value == "auto":
        return None
    try:
        return int(count_between(0, MAX_PARITY)(value))
    except ValueError:
        raise ValueError(f"is neither 'auto' nor a number from 0 to {MAX_PARITY}") from None


def parse_url(value: Any) -> str:
    if not isinstance(value, str) or (value and not re.match(r"([a-z][a-z0-9+.-]*://|/).+\Z", value)):
        raise ValueError("is neither empty nor a URL such as file:///mnt/ckpt or s3://bucket/prefix")
    return value.rstrip("/") if value else ""


def parse_switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if not isinstance(value, str) or value.lower() not in words:
        raise ValueError("is neither true nor false")
    return words[value.lower()]


def parse_optional_path(value: Any) -> Path | None:
    return None if value == "" else parse_path(value)


def one_of(*names: str) -> Parser:
    def parse(value: Any) -> str:
        if value not in names:
            raise ValueError(f"is not one of {', '.join(names)}")
        return str(value)

    return parse


_Number = TypeVar("_Number", int, float)


def _parse_number(kind: type[_Number], value: Any) -> _Number:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("is not a number")
    if kind is int and isinstance(value, float):
        raise ValueError("is not a whole number")
    try:
        return kind(value)
    except ValueError:
        raise ValueError("is not a number") from None
