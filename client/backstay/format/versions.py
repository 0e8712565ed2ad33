"""Every version that two components of backstay compare, and how far apart they may be. The only place that decides so.

A component of one release works with components of the release before. A number here is raised only with a change that the
release before cannot read; it ignores fields that are added. Standard library only; decides nothing about a mismatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

NODE_PROTOCOL: Final = 1  # node daemons and coordinator
BULK_PROTOCOL: Final = 1  # node daemons among each other
LOCAL_PROTOCOL: Final = 1  # trainers and their daemon
FILE_FORMAT: Final = 1  # manifests, plans and fragment records, on tmpfs and on durable storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of two components. ``name`` is for messages; ``release`` "": unknown."""

    name: str
    release: str = ""
    protocol: int

    def __str__(self) -> str:
        return f"{self.name} is of release {self.release or 'unknown'} (protocol {self.protocol})"


def is_spoken(protocol: int, own: int) -> bool:
    """Whether a component of protocol ``own`` understands ``protocol``: its own and the one before."""
    return own - 1 <= protocol <= own


def is_readable(file_format: int) -> bool:
    """Whether this release reads files of that format: its own and the one before."""
    return max(1, FILE_FORMAT - 1) <= file_format <= FILE_FORMAT


def unreadable(what: str, file_format: int, writer: str = "") -> str:
    """The sentence about a file of another format; the file is left as it is."""
    by = f", written by {writer}," if writer else ""
    newer = file_format > FILE_FORMAT
    step = "start a release that reads it" if newer else "a release in between reads both"
    return f"{what}{by} has format {file_format}, this release reads up to {FILE_FORMAT} and the one before: {step}"


def why_apart(own: Side, other: Side) -> str:
    """Why ``own`` cannot work with ``other``, naming both and which to upgrade first; "" if it can."""
    if is_spoken(other.protocol, own.protocol) and _is_near(own.release, other.release):
        return ""
    ours, theirs = (_parse(own.release), own.protocol), (_parse(other.release), other.protocol)
    is_older = theirs[1] < ours[1] if theirs[1] != ours[1] else (theirs[0] or (0, 0)) < (ours[0] or (0, 0))
    first = other.name if is_older else own.name
    return (
        f"{other}, {own}: parts that talk may be one minor release apart, no more. Upgrade {first} first, by one release "
        "after the other"
    )


def _is_near(one: str, other: str) -> bool:
    """Whether releases are at most one minor apart; one that is not known counts as near."""
    first, second = _parse(one), _parse(other)
    if first is None or second is None:
        return True
    return first[0] == second[0] and abs(first[1] - second[1]) <= 1


def _parse(release: str) -> tuple[int, int] | None:
    major, _, rest = release.partition(".")
    minor = rest.partition(".")[0]
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
