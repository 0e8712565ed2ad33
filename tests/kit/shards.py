"""Small shards with a true header and manifest, made without the client's own shard code."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass

from crc32c import crc32c

from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest, TensorEntry

RUN = "job/run"


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeShard:
    data: bytes
    manifest: Manifest

    @property
    def json(self) -> dict[str, object]:
        return dict(json_records.to_json(self.manifest))


def make_shard(
    *,
    run: str = RUN,
    attempt: int = 1,
    step: int = 1,
    rank: int = 0,
    world_size: int = 1,
    world_id: str = "world",
    payload_bytes: int = 300_000,
    seed: int = 0,
    tensor: str = "w",
) -> MadeShard:
    """One shard of one uint8 tensor of random bytes."""
    payload = random.Random(f"{seed}-{attempt}-{step}-{rank}").randbytes(payload_bytes)
    header = json.dumps(
        {tensor: {"dtype": "U8", "shape": [payload_bytes], "data_offsets": [0, payload_bytes]}}
    ).encode()
    header = header.ljust(4096 - 8)
    data = struct.pack("<Q", len(header)) + header + payload
    crcs = "".join(f"{crc32c(data[i : i + CHUNK_BYTES]):08x}" for i in range(0, len(data), CHUNK_BYTES))
    entry = TensorEntry(
        name=tensor,
        dtype="U8",
        shape=(payload_bytes,),
        torch_dtype="torch.uint8",
        offsets=(0,),
        global_shape=(payload_bytes,),
        begin=4096,
        end=4096 + payload_bytes,
        crc=crc32c(payload),
    )
    manifest = Manifest(
        run=run,
        attempt=attempt,
        step=step,
        rank=rank,
        world_size=world_size,
        world_id=world_id,
        size_bytes=len(data),
        header_bytes=4096,
        chunk_crcs=crcs,
        tensors=(entry,),
    )
    return MadeShard(data=data, manifest=manifest)
