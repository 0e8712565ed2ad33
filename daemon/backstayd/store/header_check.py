"""Does a filled slot carry the header its manifest describes? Checked at commit, before anything is published.

Reads the header with ``pread`` only, never through a mapping: a trainer that truncates its slot must not kill the daemon.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any

from crc32c import crc32c

from backstay.errors import IntegrityError
from backstay.format.manifest import Manifest
from backstay.format.shard import PAGE_BYTES


def check_header(fd: int, manifest: Manifest) -> None:
    """Raise IntegrityError unless the safetensors header in ``fd`` names the manifest's tensors at the manifest's places.

    The chunks that hold the header are compared with their digests as well: they were read anyway.
    """
    if manifest.header_bytes % PAGE_BYTES or not 8 < manifest.header_bytes <= manifest.size_bytes:
        raise IntegrityError(
            f"header of {manifest.header_bytes} bytes in a file of {manifest.size_bytes} is not whole pages",
            reason="bad_header",
        )
    chunks = -(-manifest.header_bytes // manifest.chunk_bytes)
    head = os.pread(fd, min(chunks * manifest.chunk_bytes, manifest.size_bytes), 0)
    for chunk in range(chunks):
        piece = head[chunk * manifest.chunk_bytes : chunk * manifest.chunk_bytes + manifest.chunk_length(chunk)]
        if crc32c(piece) != manifest.chunk_crc(chunk):
            raise IntegrityError(
                f"chunk {chunk} has crc {crc32c(piece):08x}, its manifest says {manifest.chunk_crc(chunk):08x}",
                reason="bad_chunk",
            )
    (length,) = struct.unpack_from("<Q", head)
    if length + 8 != manifest.header_bytes:
        raise IntegrityError(
            f"header of {length + 8} bytes, its manifest says {manifest.header_bytes}", reason="bad_header"
        )
    try:
        header = json.loads(head[8 : manifest.header_bytes])
        _compare(header, manifest)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise IntegrityError(f"the header is not safetensors JSON: {error!r:.200}", reason="bad_header") from error


def _compare(header: Any, manifest: Manifest) -> None:
    entries = {entry.name: entry for entry in manifest.tensors}
    found = (
        {name: value for name, value in header.items() if name != "__metadata__"} if isinstance(header, dict) else {}
    )
    if found.keys() != entries.keys():
        differing = sorted(found.keys() ^ entries.keys())[:3]
        raise IntegrityError(f"header and manifest name different tensors, such as {differing}", reason="bad_header")
    for name, entry in entries.items():
        value = found[name]
        begin, end = value["data_offsets"]
        said = (value["dtype"], tuple(value["shape"]), begin + manifest.header_bytes, end + manifest.header_bytes)
        if said != (entry.dtype, entry.shape, entry.begin, entry.end):
            raise IntegrityError(f"tensor {name} is {said} in the header, not as in the manifest", reason="bad_header")
