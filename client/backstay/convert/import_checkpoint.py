"""``python -m backstay.convert.import_checkpoint``: writes a foreign checkpoint as the shards of a snapshot, locally.

Run by ``backstay import`` in a process of its own, because the operator's command never imports torch. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from backstay._version import __version__
from backstay.convert import foreign_checkpoints, snapshot_writer
from backstay.errors import BackstayError, UsageError
from backstay.format.shard import IMPORTED_KEY
from backstay.trainer.optimizer_state import METADATA_KEY


def main(argv: Sequence[str] | None = None) -> int:
    """Convert; exit status 0, or 1 with the error as JSON."""
    arguments = _parse(argv)
    try:
        print(json.dumps(_convert(arguments)))
    except BackstayError as error:
        print(json.dumps({"error_class": type(error).__name__, "reason": error.reason, "message": str(error)}))
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="backstay import")
    parser.add_argument("--from", dest="source", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--format", default="")
    parser.add_argument("--step", type=int, default=-1)
    parser.add_argument("--dtype", default="")
    parser.add_argument("--model-prefix")
    parser.add_argument("--shard-bytes", type=int, default=snapshot_writer.DEFAULT_SHARD_BYTES)
    return parser.parse_args(argv)


def _convert(arguments: argparse.Namespace) -> dict[str, object]:
    if not arguments.source.is_dir():
        raise UsageError(f"{arguments.source} is not a directory", reason="no_directory")
    kind = arguments.format or foreign_checkpoints.detect(arguments.source)
    dtype = _dtype(arguments.dtype)
    found = foreign_checkpoints.read_checkpoint(arguments.source, kind, dtype=dtype, prefix=arguments.model_prefix)
    step = arguments.step if arguments.step >= 0 else found.step
    if step is None:
        if found.states:
            raise UsageError(
                f"{arguments.source} does not say which step it is of; give --step (the optimizer's state continues from it)",
                reason="no_step",
            )
        step = 0
    metadata = {
        IMPORTED_KEY: kind,
        METADATA_KEY: foreign_checkpoints.optimizer_description(found),
    }
    identity = snapshot_writer.Identity(
        run=arguments.run, attempt=1, step=step, writer=f"backstay {__version__} import of {arguments.source}"
    )
    manifests = snapshot_writer.write_shards(
        found.sources, arguments.to, identity=identity, metadata=metadata, shard_bytes=arguments.shard_bytes
    )
    return {
        "format": kind,
        "step": step,
        "shards": len(manifests),
        "tensors": len(found.sources),
        "optimizer_parameters": len(found.states),
        "size_bytes": sum(manifest.size_bytes for manifest in manifests),
        "left_out": list(found.left_out),
    }


def _dtype(name: str) -> torch.dtype | None:
    if not name:
        return None
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"{name!r} is no dtype of torch, such as bfloat16", reason="bad_dtype")
    return dtype


if __name__ == "__main__":
    sys.exit(main())
