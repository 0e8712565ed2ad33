"""Reads serial number and URIs of a certificate from its bytes: the same code for gRPC, the bulk port and our own files. Pure.

gRPC returns names truncated at the first zero byte, so that ``.../operator\\0.example`` would pass for ``.../operator``. The
bytes have already been verified: one of our authorities signed them. Anything that is not strict DER is rejected.
"""

from __future__ import annotations

import binascii
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from backstay.errors import ConfigError

_SEQUENCE: Final = 0x30
_INTEGER: Final = 0x02
_OID: Final = 0x06
_OCTETS: Final = 0x04
_VERSION: Final = 0xA0
_EXTENSIONS: Final = 0xA3
_URI: Final = 0x86  # GeneralName [6], uniformResourceIdentifier
_ALTERNATIVE_NAMES: Final = bytes.fromhex("551d11")  # 2.5.29.17
_TEXT: Final = re.compile(rb"[\x21-\x7e]+\Z")
MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """``serial`` in hexadecimal, as operators' tools show it; ``uris`` are its alternative names of that kind, in order."""

    serial: str
    uris: tuple[str, ...]


def read_pem(pem: bytes) -> Certificate:
    """As :func:`read_der`, from PEM."""
    try:
        return read_der(ssl.PEM_cert_to_DER_cert(pem.decode("ascii")))
    except (ValueError, binascii.Error) as error:
        raise _unreadable(f"it is not PEM ({error})") from None


def read_der(der: bytes) -> Certificate:
    """Serial number and URIs of an X.509 certificate (RFC 5280, 4.1); ConfigError (``no_identity``) if it cannot be read."""
    if len(der) > MAX_BYTES:
        raise _unreadable(f"it has {len(der)} bytes")
    outer = list(_items(_only(der, _SEQUENCE)))
    if not outer or outer[0][0] != _SEQUENCE:
        raise _unreadable("it is not a certificate")
    fields = [field for field in _items(outer[0][1]) if field[0] != _VERSION]
    if not fields or fields[0][0] != _INTEGER:
        raise _unreadable("it has no serial number")
    extensions = [value for tag, value in fields if tag == _EXTENSIONS]
    names = [found for value in extensions for found in _alternative_names(_only(value, _SEQUENCE))]
    if len(names) > 1:
        raise _unreadable(f"it lists alternative names {len(names)} times")
    uris = [value for found in names for tag, value in _items(_only(found, _SEQUENCE)) if tag == _URI]
    return Certificate(serial=fields[0][1].hex().lstrip("0") or "0", uris=tuple(map(_text, uris)))


def _alternative_names(extensions: bytes) -> Iterator[bytes]:
    for tag, extension in _items(extensions):
        parts = list(_items(extension)) if tag == _SEQUENCE else []
        if len(parts) > 1 and parts[0] == (_OID, _ALTERNATIVE_NAMES) and parts[-1][0] == _OCTETS:
            yield parts[-1][1]


def _text(uri: bytes) -> str:
    if not _TEXT.match(uri):
        raise _unreadable(f"one of its URIs is not plain ASCII: {uri[:120]!a}")
    return uri.decode("ascii")


def _only(data: bytes, tag: int) -> bytes:
    """The content of the single item that ``data`` must consist of."""
    found = list(_items(data))
    if len(found) != 1 or found[0][0] != tag:
        raise _unreadable("it is not DER")
    return found[0][1]


def _items(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tags and contents of the items in ``data`` (X.690, 8.1.2 and 8.1.3): definite lengths, tags of one byte."""
    at = 0
    while at < len(data):
        if len(data) - at < 2 or data[at] & 0x1F == 0x1F:
            raise _unreadable("it is not DER")
        tag, size, at = data[at], data[at + 1], at + 2
        if size & 0x80:
            count = size & 0x7F
            if not 1 <= count <= 4 or len(data) - at < count:
                raise _unreadable("it is not DER")
            size, at = int.from_bytes(data[at : at + count], "big"), at + count
        if len(data) - at < size:
            raise _unreadable("it is truncated")
        yield tag, data[at : at + size]
        at += size


def _unreadable(why: str) -> ConfigError:
    return ConfigError(f"the certificate's names cannot be read: {why}", reason="no_identity")
