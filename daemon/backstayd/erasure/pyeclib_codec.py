"""Cauchy Reed-Solomon by pyeclib's bundled ISA-L. Hides pyeclib's fragment headers; does no I/O.

pyeclib puts an 80-byte header before each fragment. With ``chksum_type="none"`` it depends on index and length only, so
headers of a zero window serve as templates for every window of that length.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pyeclib.ec_iface import ECDriver

from backstay.errors import InvariantError, UnrecoverableError
from backstayd.erasure.codec import Buffer

_HEADER_BYTES: Final = 80
_TEMPLATES_KEPT: Final = 64  # lengths: the full window, and the tails of recent shards


class PyeclibCodec:
    """One k + m code, 1 <= k, 1 <= m <= 4. Safe to share between threads: pyeclib holds the GIL for every call."""

    def __init__(self, k: int, m: int) -> None:
        if k < 1 or m < 1:
            raise InvariantError(f"no code with k={k}, m={m}: m = 0 stores no parity and needs none")
        self._k = k
        self._m = m
        self._driver: Any = ECDriver(k=k, m=m, ec_type="isa_l_rs_cauchy", chksum_type="none")
        self._headers = functools.lru_cache(maxsize=_TEMPLATES_KEPT)(self._make_headers)

    @property
    def k(self) -> int:
        return self._k

    @property
    def m(self) -> int:
        return self._m

    def encode(self, blocks: Sequence[Buffer]) -> list[memoryview]:
        # Two copies per window that pyeclib forces: its input is one bytes object, its output repeats the data fragments.
        fragments = self._driver.encode(b"".join(blocks))
        return [memoryview(fragment)[_HEADER_BYTES:] for fragment in fragments[self._k :]]

    def reconstruct(self, available: Mapping[int, Buffer], wanted: Sequence[int]) -> list[memoryview]:
        if len(available) < self._k:
            raise UnrecoverableError(f"cannot decode: {len(available)} of {self._k} fragments available")
        if not wanted:
            return []
        used = sorted(available)[: self._k]
        headers = self._headers(len(available[used[0]]))
        payloads = [b"".join((headers[index], available[index])) for index in used]  # pyeclib wants headers in front
        order = sorted(wanted)  # pyeclib answers in ascending order, whatever it is asked
        found = dict(zip(order, self._driver.reconstruct(payloads, order), strict=True))
        return [memoryview(found[index])[_HEADER_BYTES:] for index in wanted]

    def _make_headers(self, length: int) -> tuple[bytes, ...]:
        fragments = self._driver.encode(bytes(length * self._k))
        if len(fragments) != self._k + self._m or any(len(f) != length + _HEADER_BYTES for f in fragments):
            raise InvariantError(f"pyeclib pads {length}-byte fragments to {len(fragments[0]) - _HEADER_BYTES} bytes")
        return tuple(fragment[:_HEADER_BYTES] for fragment in fragments)


@functools.lru_cache(maxsize=64)
def codec_for(k: int, m: int) -> PyeclibCodec:
    """The process's codec of that shape."""
    return PyeclibCodec(k, m)
