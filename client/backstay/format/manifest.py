"""The manifest: a shard's commit record and the identity of its bytes.

Standard library only, no tensors. Written last, by rename; its SHA-256 is the shard's digest everywhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from backstay.errors import IntegrityError
from backstay.format import json_records, versions
from backstay.ids import MAX_COUNT, MAX_WORLD_SIZE

FORMAT_VERSION: Final = versions.FILE_FORMAT
CHUNK_BYTES: Final = 256 * 1024  # the unit of every digest, transfer and verification
MAX_LABEL: Final = 256  # characters of what names a world, a layout, a writer: it travels in every report of the shard


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of a shard.

    ``dtype`` and ``shape`` are as stored in the safetensors header, ``torch_dtype`` the true one (``"torch.bfloat16"``): they
    differ for dtypes that DCP's safetensors reader does not know. ``offsets`` and ``global_shape`` place this chunk in the
    whole tensor. ``begin`` and ``end`` are bytes from the start of the *file*. ``crc`` is the crc32c of those bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    torch_dtype: str
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]
    begin: int
    end: int
    crc: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnchangedRange:
    """The writer states that ``chunk_count`` chunks from ``first_chunk`` on have had the same bytes at every step that it
    committed since ``since_step``, in this attempt and world and at this size of the shard."""

    first_chunk: int
    chunk_count: int
    since_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Commit record of one shard; immutable once published."""

    format: int = FORMAT_VERSION
    run: str
    attempt: int
    step: int
    rank: int
    world_size: int
    world_id: str
    size_bytes: int  # of the safetensors file, header included
    header_bytes: int  # 8 + header length: a multiple of 4096
    chunk_bytes: int = CHUNK_BYTES
    chunk_crcs: str  # crc32c of each chunk of the file, 8 hex digits each, in order
    tensors: tuple[TensorEntry, ...]
    aliases: dict[str, str] = field(default_factory=dict)  # tied weights: name -> name of the stored tensor
    model_signature: str = ""
    writer: str = ""  # "backstay 0.1.0, pid 123"
    unchanged: tuple[UnchangedRange, ...] = ()  # ascending; nothing is stated about other chunks
    layout: str = ""  # which boxes of which model tensors the writer held (as in Attach); "" = not known

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON; 64 hex digits."""
        return hashlib.sha256(json_records.dumps(self)).hexdigest()

    @property
    def chunk_count(self) -> int:
        return -(-self.size_bytes // self.chunk_bytes)

    def chunk_crc(self, index: int) -> int:
        return int(self.chunk_crcs[8 * index : 8 * index + 8], 16)

    def chunk_length(self, index: int) -> int:
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)

    def check(self) -> None:
        """Raise IntegrityError if the manifest contradicts itself or is of a format this version does not read."""
        if not versions.is_readable(self.format):
            raise IntegrityError(versions.unreadable("a manifest", self.format, self.writer), reason="bad_format")
        if self.chunk_bytes != CHUNK_BYTES:
            raise IntegrityError(
                f"manifest with chunks of {self.chunk_bytes} bytes, not {CHUNK_BYTES}", reason="bad_format"
            )
        longest = max(map(len, (self.run, self.world_id, self.model_signature, self.writer, self.layout)))
        if longest > MAX_LABEL:
            raise IntegrityError(
                f"manifest with a name, layout or signature of {longest} characters; at most {MAX_LABEL} are allowed",
                reason="bad_manifest",
            )
        if (
            not 0 <= self.rank < self.world_size <= MAX_WORLD_SIZE
            or not 0 <= self.attempt < MAX_COUNT
            or not 0 <= self.step < MAX_COUNT
            or self.size_bytes >= MAX_COUNT
        ):
            raise IntegrityError(
                f"manifest of rank {self.rank} of {self.world_size}, attempt {self.attempt}, step {self.step}, "
                f"{self.size_bytes} bytes: no such shard",
                reason="bad_manifest",
            )
        if not 0 <= self.header_bytes <= self.size_bytes:
            raise IntegrityError(
                f"manifest of {self.size_bytes} bytes with a header of {self.header_bytes}", reason="bad_manifest"
            )
        if len(self.chunk_crcs) != 8 * self.chunk_count:
            raise IntegrityError(
                f"manifest of {self.size_bytes} bytes has {len(self.chunk_crcs) // 8} chunk digests, not {self.chunk_count}",
                reason="bad_manifest",
            )
        if not _is_hexadecimal(self.chunk_crcs):
            raise IntegrityError("manifest has chunk digests that are not hexadecimal", reason="bad_manifest")
        self._check_tensors()
        self._check_unchanged()

    def _check_tensors(self) -> None:
        position = self.header_bytes
        for entry in self.tensors:
            if not position <= entry.begin <= entry.end <= self.size_bytes:
                raise IntegrityError(
                    f"manifest puts tensor {entry.name!r} at bytes {entry.begin} to {entry.end}, where {position} to "
                    f"{self.size_bytes} are free",
                    reason="bad_manifest",
                )
            position = entry.end

    def _check_unchanged(self) -> None:
        position = 0
        for one in self.unchanged:
            end = one.first_chunk + one.chunk_count
            if not position <= one.first_chunk < end <= self.chunk_count or not 0 <= one.since_step < self.step:
                raise IntegrityError(
                    f"manifest of step {self.step} with {self.chunk_count} chunks says that chunks {one.first_chunk} to {end} "
                    f"are unchanged since step {one.since_step}",
                    reason="bad_manifest",
                )
            position = end


def _is_hexadecimal(text: str) -> bool:
    """Whether these are pairs of lower-case hexadecimal digits; an eighth of the time of a regular expression."""
    try:
        return bytes.fromhex(text).hex() == text
    except ValueError:
        return False
