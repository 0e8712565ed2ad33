"""`backstay import RUN --from DIR --to URL`: a foreign checkpoint becomes a persisted snapshot that a run starts from.

Converts in a separate process (it needs torch, which this command never imports), then publishes; the completion record last.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from crc32c import crc32c

from backstay import __version__
from backstay.errors import ERROR_CLASSES, BackstayError, ConfigError, IntegrityError, UsageError
from backstay.format import json_records
from backstay.format.manifest import CHUNK_BYTES, Manifest
from backstay.ids import RunKey, snapshot_id
from backstayd.cli.convert.snapshot_shards import FileBytes, persisted_keys
from backstayd.cli.tables import as_json
from backstayd.core.inventory.durable_names import RECORD_NAME, run_url, snapshot_url
from backstayd.core.messages.decisions import Lineage
from backstayd.core.messages.durable import PersistedSnapshot
from backstayd.core.messages.plans import VolumeShard
from backstayd.durable.open import open_place
from backstayd.durable.place import chunk_range
from backstayd.durable.publish import publish_shard
from backstayd.printable import say
from backstayd.store.record_files import ShardChunks, parse_manifest
from backstayd.units import format_size


def run(arguments: argparse.Namespace) -> int:
    run_ = str(RunKey.parse(arguments.run))
    root = run_url(arguments.to, run_)
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("import needs torch: pip install 'backstay[torch]'", reason="missing_package")
    open_place(arguments.to).require_root()
    taken = next(persisted_keys(root), None)
    if taken is not None:
        raise UsageError(
            f"{root} already holds snapshots (step {taken.step} of attempt {taken.attempt}); import into a new run_id",
            reason="run_exists",
        )
    with tempfile.TemporaryDirectory(prefix="backstay-import-", dir=arguments.work_dir) as directory:
        summary = _convert(arguments, run_, Path(directory))
        manifests = [
            json_records.loads(Manifest, path.read_bytes()) for path in sorted(Path(directory).glob("*.manifest.json"))
        ]
        found = _record(run_, manifests)
        url = snapshot_url(root, found.key)
        _publish(Path(directory), url, found)
    if arguments.json:
        say(as_json(summary | {"run": run_, "url": url, "snapshot_id": found.snapshot_id}))
        return 0
    say(
        f"{run_}: {summary['tensors']} tensors ({format_size(float(summary['size_bytes']))}) of a {summary['format']} "
        f"checkpoint, with optimizer state of {summary['optimizer_parameters']} parameters, are step {summary['step']} at {url}"
    )
    if summary["left_out"]:
        shown = ", ".join(summary["left_out"][:5])
        say(
            f"not imported, the training script's values are used: {shown}{', ...' if len(summary['left_out']) > 5 else ''}"
        )
    job, _, run_id = found.run.partition("/")
    named = f"run_id={run_id!r}" + (f", job={job!r}" if job != "default" else "")
    say(f"Start the run with {named} under a coordinator with persist_url = {arguments.to!r}.")
    return 0


def _convert(arguments: argparse.Namespace, run_: str, directory: Path) -> dict[str, Any]:
    options = ["--from", str(arguments.source), "--to", str(directory), "--run", run_, "--step", str(arguments.step)]
    options += ["--format", arguments.format, "--dtype", arguments.dtype]
    if arguments.model_prefix is not None:
        options += ["--model-prefix", arguments.model_prefix]
    done = subprocess.run(
        [sys.executable, "-m", "backstay.convert.import_checkpoint", *options],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise BackstayError(f"the conversion failed with status {done.returncode}; see its message above") from None
    if "error_class" in answer:
        raise ERROR_CLASSES.get(answer["error_class"], BackstayError)(answer["message"], reason=answer["reason"])
    return answer


def _record(run_: str, manifests: list[Manifest]) -> PersistedSnapshot:
    manifests = sorted(manifests, key=lambda manifest: manifest.rank)
    first = manifests[0]
    rows = tuple(VolumeShard(rank=m.rank, size_bytes=m.size_bytes, digest=m.digest, layout=m.layout) for m in manifests)
    found = PersistedSnapshot(
        run=run_,
        attempt=first.attempt,
        step=first.step,
        world_size=first.world_size,
        snapshot_id="",
        shards=rows,
        lineage=(Lineage(attempt=first.attempt, base_attempt=0, base_step=0),),
        serial=1,
        unix_s=time.time(),
        writer=f"backstay {__version__} import",
    )
    identity = snapshot_id(key=found.key, world_size=found.world_size, shard_digests=[row.digest for row in rows])
    return json_records.from_json(PersistedSnapshot, json_records.to_json(found) | {"snapshot_id": identity})


def _publish(directory: Path, url: str, found: PersistedSnapshot) -> None:
    """Copy the shards, then write the completion record, which makes the snapshot exist."""
    place = open_place(url)
    for path in sorted(directory.glob("*.safetensors")):
        manifest = path.with_name(path.name.replace(".safetensors", ".manifest.json"))
        raw = manifest.read_bytes()
        digest = hashlib.sha256(raw).hexdigest()
        chunks = parse_manifest(raw, digest=digest)
        with path.open("rb") as file:
            source = _ConvertedShard(file.fileno(), chunks)
            publish_shard(place, rank=chunks.rank, source=source, manifest=raw, mark="import", check=lambda: None)
    if not place.create(RECORD_NAME, json_records.dumps(found)):
        raise UsageError(f"{url} already has a completion record; import into a new run_id", reason="run_exists")


class _ConvertedShard:
    """A shard file as an upload reads it: every chunk is verified in the buffer it is sent from."""

    def __init__(self, fd: int, chunks: ShardChunks) -> None:
        self._fd = fd
        self.chunks = chunks

    def read_verified(self, offset: int, view: memoryview) -> None:
        FileBytes(self._fd).read_into(offset, view)
        for chunk in chunk_range(self.chunks, offset, len(view)):
            begin = chunk * CHUNK_BYTES - offset
            if crc32c(view[begin : begin + self.chunks.chunk_length(chunk)]) != self.chunks.chunk_crc(chunk):
                raise IntegrityError(
                    f"chunk {chunk} of a converted shard changed on disk; not published", reason="corrupt_chunk"
                )

    def spend(self, size_bytes: int) -> None:
        """No bandwidth limit: the operator is waiting."""

    def note_done(self, size_bytes: int) -> None:
        """Progress is not shown."""
