"""crc32c of a shard's chunks and tensors: computed by the writer in one pass, checked by every reader in the buffer it uses.

Must never copy the bytes it hashes. The checksums find accidents, not forgeries.
"""

from __future__ import annotations

import functools
import sys
from array import array
from bisect import bisect_right
from collections.abc import Mapping
from typing import Final, NamedTuple

from crc32c import crc32c

from backstay.errors import IntegrityError, SnapshotNotFoundError, UsageError
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstay.format.shard import Layout, read_range, shard_label

Buffer = bytes | bytearray | memoryview

_POLYNOMIAL: Final = 0x82F63B78  # Castagnoli, reflected


Tables = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@functools.cache
def _zeros_operator(digit: int, position: int) -> Tables:
    """Effect of ``digit * 16**position`` zero bytes on a crc register: a table of 256 for each byte of the register.

    The operators are linear over GF(2), and operators of lengths that add up are applied one after the other
    (M. Adler's crc32_combine in zlib has one for each bit of the length; a hexadecimal digit takes half the steps).
    """
    columns = [1 << bit for bit in range(32)]
    if digit == 1 and position == 0:
        columns = [_shift_one_byte(column) for column in columns]
    else:
        rest, step = (digit - 1, position) if digit > 1 else (15, position - 1)
        for tables in (_zeros_operator(rest, step), _zeros_operator(1, step)):
            columns = [_apply(tables, column) for column in columns]
    return (_table(columns[:8]), _table(columns[8:16]), _table(columns[16:24]), _table(columns[24:]))


def _table(columns: list[int]) -> tuple[int, ...]:
    table = [0]
    for column in columns:
        table += [value ^ column for value in table]
    return tuple(table)


def _shift_one_byte(register: int) -> int:
    for _ in range(8):
        register = (register >> 1) ^ (_POLYNOMIAL if register & 1 else 0)
    return register


def _apply(tables: Tables, crc: int) -> int:
    t0, t1, t2, t3 = tables
    return t0[crc & 255] ^ t1[crc >> 8 & 255] ^ t2[crc >> 16 & 255] ^ t3[crc >> 24]


def combine(crc_a: int, crc_b: int, length_b: int) -> int:
    """The crc32c of A followed by B, from those of A and of B and the length of B in bytes."""
    position = 0
    while length_b and crc_a:
        if digit := length_b & 15:
            crc_a = _apply(_zeros_operator(digit, position), crc_a)
        length_b >>= 4
        position += 1
    return crc_a ^ crc_b


class Digests(NamedTuple):
    """crc32c of every chunk of a shard, as its manifest holds them, and of every tensor by name."""

    chunk_crcs: str
    tensor_crcs: dict[str, int]


class Digester:
    """Digests of one shard while it is written: every byte is hashed once, tensor digests are combined from the pieces.

    Chunks may come in any order and from several threads, each chunk from one thread, whole or in consecutive parts.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._spans = [(entry.begin, entry.end) for entry in layout.entries if entry.end > entry.begin]
        self._ends = [layout.header_bytes, *(end for _, end in self._spans)]
        chunk_count = -(-layout.size_bytes // CHUNK_BYTES)
        self._chunk_crcs = array("I", bytes(4 * chunk_count))
        self._is_whole = bytearray(chunk_count)  # 1: its crc is known
        self._begun: dict[int, tuple[int, int]] = {}  # chunks given in part: how much of it, and the crc of that
        self._assumed: dict[str, int] = {}
        self._pieces: dict[int, tuple[int, int]] = {}  # of what was not hashed as a whole chunk: begin -> length, crc

    def update(self, view: Buffer, chunk_index: int) -> None:
        """Hash the next bytes of chunk ``chunk_index``: the whole chunk, or the part that follows the one given before."""
        length = self._length(chunk_index)
        filled, crc = (length, 0) if self._is_whole[chunk_index] else self._begun.get(chunk_index, (0, 0))
        begin = chunk_index * CHUNK_BYTES + filled
        part_bytes = len(view) if isinstance(view, (bytes, bytearray)) else view.nbytes
        if filled + part_bytes > length:
            raise UsageError(
                f"{part_bytes} bytes do not fit in chunk {chunk_index}: {filled} of {length} are there already"
            )
        if part_bytes == CHUNK_BYTES and self._ends[bisect_right(self._ends, begin)] >= begin + CHUNK_BYTES:
            crc = crc32c(view)
        elif part_bytes:
            crc = self._update_pieces(_flat(view), begin, crc)
        if not self._is_whole[chunk_index]:
            self._note(chunk_index, filled + part_bytes, crc)

    def assume(self, chunks: range, crcs: str) -> None:
        """Take the digests of whole chunks that are not given, as :meth:`finish` gave them for the same bytes."""
        known = _from_hex(crcs)
        if len(known) != len(chunks):
            raise UsageError(f"{len(known)} digests were given for {len(chunks)} chunks")
        self._chunk_crcs[chunks.start : chunks.stop] = known
        self._is_whole[chunks.start : chunks.stop] = b"\1" * len(chunks)

    def assume_tensors(self, tensor_crcs: Mapping[str, int]) -> None:
        """Take the digests of tensors that lie in such chunks."""
        self._assumed.update(tensor_crcs)

    def update_span(self, view: Buffer, first_chunk: int = 0) -> None:
        """Hash consecutive chunks of a contiguous buffer that starts with chunk ``first_chunk``."""
        view = _flat(view)
        for index, begin in enumerate(range(0, view.nbytes, CHUNK_BYTES), first_chunk):
            self.update(view[begin : begin + CHUNK_BYTES], index)

    def finish(self) -> Digests:
        """The digests of the whole shard.

        Raises:
            UsageError: if not every byte of the shard was given.
        """
        missing = self._is_whole.find(0)
        if missing >= 0:
            raise UsageError(
                f"chunk {missing} of {len(self._is_whole)} was not hashed to its end "
                f"({self._begun.get(missing, (0, 0))[0]} bytes were)"
            )
        tensor_crcs = {
            e.name: self._assumed[e.name] if e.name in self._assumed else self._span_crc(e.begin, e.end)
            for e in self._layout.entries
        }
        return Digests(_to_hex(self._chunk_crcs), tensor_crcs)

    def _length(self, chunk_index: int) -> int:
        return min(CHUNK_BYTES, self._layout.size_bytes - chunk_index * CHUNK_BYTES)

    def _note(self, chunk_index: int, filled: int, crc: int) -> None:
        if filled == self._length(chunk_index):
            self._begun.pop(chunk_index, None)
            self._chunk_crcs[chunk_index], self._is_whole[chunk_index] = crc, 1
        else:
            self._begun[chunk_index] = (filled, crc)

    def _update_pieces(self, view: memoryview, begin: int, chunk_crc: int) -> int:
        done = 0
        while done < view.nbytes:
            end = min(self._ends[bisect_right(self._ends, begin + done)], begin + view.nbytes)
            piece = view[done : end - begin]
            crc = crc32c(piece)
            self._pieces[begin + done] = (piece.nbytes, crc)
            chunk_crc = combine(chunk_crc, crc, piece.nbytes)
            done = end - begin
        return chunk_crc

    def _span_crc(self, begin: int, end: int) -> int:
        """Combine the pieces of one tensor: whole chunks by their own crc, the others as they were hashed."""
        pieces, chunk_crcs = self._pieces, self._chunk_crcs
        t0, t1, t2, t3 = _zeros_operator(4, 4)  # CHUNK_BYTES is 4 * 16**4
        crc = 0
        while begin < end:
            piece = pieces.get(begin)
            if piece is None:  # a whole chunk within one tensor: combine(), inlined as this runs once per 256 KiB
                shifted = t0[crc & 255] ^ t1[crc >> 8 & 255] ^ t2[crc >> 16 & 255] ^ t3[crc >> 24]
                crc = shifted ^ chunk_crcs[begin // CHUNK_BYTES]
                begin += CHUNK_BYTES
            else:
                length, piece_crc = piece
                crc = combine(crc, piece_crc, length)
                begin += length
        return crc


def _to_hex(crcs: array[int]) -> str:
    """Eight hexadecimal digits for each."""
    ordered = array("I", crcs)
    if sys.byteorder == "little":
        ordered.byteswap()
    return ordered.tobytes().hex()


def _from_hex(text: str) -> array[int]:
    crcs = array("I", bytes.fromhex(text))
    if sys.byteorder == "little":
        crcs.byteswap()
    return crcs


def verify_chunks(view: Buffer, manifest: Manifest, first_chunk: int) -> None:
    """Check the chunks in ``view``, which starts with ``first_chunk`` and ends with a chunk's or the file's end.

    Raises:
        IntegrityError: naming the first chunk that differs, expected and found crc.
        UsageError: if ``view`` ends inside a chunk.
    """
    view = _flat(view)
    begin = 0
    for index in range(first_chunk, first_chunk + -(-view.nbytes // CHUNK_BYTES)):
        length = manifest.chunk_length(index)
        piece = view[begin : begin + length]
        if length <= 0 or piece.nbytes != length:
            raise UsageError(
                f"buffer to verify does not end with chunk {index} of {manifest.chunk_count} ({length} bytes)"
            )
        _check_chunk(manifest, index, crc32c(piece))
        begin += length


def read_tensor(fd: int, manifest: Manifest, name: str) -> bytes:
    """The verified bytes of one tensor (or of the target of an alias), read by ``pread``.

    Raises:
        SnapshotNotFoundError: no such tensor. IntegrityError: the bytes differ from the tensor's crc, or the file is short.
    """
    stored = manifest.aliases.get(name, name)
    entry = next((entry for entry in manifest.tensors if entry.name == stored), None)
    if entry is None:
        raise SnapshotNotFoundError(f"{shard_label(manifest)} has no tensor {name!r} among its {len(manifest.tensors)}")
    data = read_range(fd, entry.begin, entry.end)
    found = crc32c(data)
    if found != entry.crc:
        raise IntegrityError(
            f"{shard_label(manifest)}: tensor {stored!r} (bytes {entry.begin} to {entry.end}) has crc32c {found:08x}, "
            f"its manifest says {entry.crc:08x}; not used",
            reason="corrupt_tensor",
        )
    return data


def _check_chunk(manifest: Manifest, index: int, found: int) -> None:
    expected = manifest.chunk_crc(index)
    if found != expected:
        raise IntegrityError(
            f"{shard_label(manifest)}: chunk {index} of {manifest.chunk_count} has crc32c {found:08x}, "
            f"its manifest says {expected:08x}; not used",
            reason="corrupt_chunk",
        )


def _flat(view: Buffer) -> memoryview:
    view = memoryview(view)
    if view.nbytes == 0:
        return memoryview(b"")  # a view with a zero in its shape cannot be cast
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
