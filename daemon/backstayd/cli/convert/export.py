"""`backstay export RUN --to DIR`: a Hugging Face model from a snapshot in memory or on durable storage. Changes nothing."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

from backstay.convert import huggingface
from backstay.convert.consolidate import Shard, aliases_of, check_manifests, differing_copies, whole_tensors
from backstay.errors import BackstayError
from backstayd.cli.convert.snapshot_shards import open_in_memory, open_persisted
from backstayd.cli.tables import as_json
from backstayd.printable import say
from backstayd.units import format_size


def run(arguments: argparse.Namespace) -> int:
    with _shards(arguments) as shards:
        run_ = shards[0].manifest.run
        check_manifests({shard.manifest.rank: shard.manifest for shard in shards})
        step = shards[0].manifest.step
        tensors = whole_tensors(shards, prefix=arguments.prefix)
        written = huggingface.write_model(tensors, Path(arguments.to), file_bytes=arguments.file_size)
        differing = differing_copies(shards, prefix=arguments.prefix)
        aliases = aliases_of(shards, prefix=arguments.prefix)
    if arguments.json:
        say(
            as_json(
                {
                    "run": run_,
                    "step": step,
                    "files": [str(path) for path in written.files],
                    "tensors": written.tensor_count,
                    "size_bytes": written.size_bytes,
                    "tied": aliases,
                    "taken_from_one_rank": {name: list(ranks) for name, ranks in differing.items()},
                }
            )
        )
        return 0
    say(
        f"{run_} at step {step}: {written.tensor_count} tensors, {format_size(written.size_bytes)}, in "
        f"{len(written.files)} files below {arguments.to}"
    )
    for name, target in aliases.items():
        say(f"tied, written once: {name} is {target}")
    for name, ranks in differing.items():
        say(f"ranks {', '.join(map(str, ranks))} hold different copies of {name}; wrote that of rank {ranks[0]}")
    return 0


@contextlib.contextmanager
def _shards(arguments: argparse.Namespace) -> Iterator[list[Shard]]:
    run = arguments.run
    opened = (
        open_persisted(arguments.source, run, step=arguments.step)
        if arguments.source
        else open_in_memory(str(arguments.socket), run, step=arguments.step, prefix=arguments.prefix)
    )
    with opened as shards:
        try:
            yield shards
        except OSError as error:
            raise BackstayError(f"export to {arguments.to} failed: {error.strerror or error}") from error
