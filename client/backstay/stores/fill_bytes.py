"""Bytes of any origin into a slot, with their digests; and digests of a slot whose bytes lie there already.

Must not communicate with the daemon.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch

from backstay.capture.capture import Capture
from backstay.capture.copy_windows import WINDOW_BYTES
from backstay.capture.fill import Filler
from backstay.capture.shard_plan import Piece, Plan
from backstay.format import shard
from backstay.format.digest import Digester, Digests
from backstay.format.manifest import CHUNK_BYTES
from backstay.trainer import raw_memory
from backstay.trainer.local_tensors import Holdings

_NOTHING: Final = Holdings()


def fill(
    filler: Filler, mapping: raw_memory.Mapping, layout: shard.Layout, sources: Mapping[str, torch.Tensor], *, step: int
) -> Digests:
    """Copy every tensor of ``layout`` from ``sources`` (by name; on any device, of any strides) and hash behind the copy."""
    pieces = tuple(
        Piece(name=e.name, begin=e.begin, end=e.end, source=sources[e.name], is_eager=False) for e in layout.entries
    )
    plan = Plan(
        holdings=_NOTHING, layout=layout, specs=(), pieces=pieces, staging={}, eager=(), state_name="", state_bytes=0,
        signature="", layout_signature="",
    )  # fmt: skip
    device = next((p.source.device for p in pieces if p.source.device.type == "cuda"), None)
    ready = filler.copier(device).mark_ready() if device is not None else None
    capture = Capture(plan, step, is_checked=False, ready=ready)
    capture.begin(mapping)
    return filler.fill(capture, mapping)


def put(mapping: raw_memory.Mapping, layout: shard.Layout, name: str, source: torch.Tensor) -> torch.Tensor:
    """Copy one tensor to its place in the slot; gives the tensor that lies there, of the source's dtype and shape."""
    entry = layout.entry(name)
    target = mapping.tensor(entry.begin, entry.end, source.dtype, tuple(source.shape))
    target.copy_(source)
    return target


def hash_in_place(mapping: raw_memory.Mapping, layout: shard.Layout) -> Digests:
    """Write the header of a slot whose tensors lie there, and hash all of it."""
    mapping.view(0, layout.header_bytes)[:] = layout.header
    digester = Digester(layout)
    begins = range(0, layout.size_bytes, WINDOW_BYTES)

    def work(begin: int) -> None:
        end = min(begin + WINDOW_BYTES, layout.size_bytes)
        digester.update_span(mapping.view(begin, end), begin // CHUNK_BYTES)

    with ThreadPoolExecutor(max_workers=min(2, len(os.sched_getaffinity(0)))) as pool:
        for _ in pool.map(work, begins):
            pass
    return digester.finish()
