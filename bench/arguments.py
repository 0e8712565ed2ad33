"""The benchmark's command line, parsed into one frozen record."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backstay.errors import UsageError
from backstayd.units import parse_size

_QUICK_BYTES = 8 * 1024**2
PARTS = ("solo", "frozen", "pair", "protect", "reshard", "persist", "rest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sizes, counts and where the report goes."""

    size_bytes: int  # parameters and optimizer state of one rank
    protect_size_bytes: int  # the shard of each node in the protect and rebuild part
    ranks: int  # trainers of the step-overhead part, one node each
    rounds: int
    rebuild_rounds: int
    steps: int  # timed steps per round and method
    cpu_step_s: float
    rest_s: float  # of each round of the part at rest
    protect_nodes: int
    parity: int
    has_peers: bool
    parts: tuple[str, ...]
    json_path: Path | None
    keep_logs: Path | None


def parse(argv: Sequence[str]) -> Settings:
    """Settings from a command line; UsageError or argparse's exit for a bad one."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure what snapshots cost and how fast state is restored, compared with memcpy, raw TCP and DCP.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the full report to FILE")
    parser.add_argument("--size", help="state per rank (default 512MiB)")
    parser.add_argument("--protect-size", help="shard per node in the protect and rebuild part (default: as --size)")
    parser.add_argument("--ranks", type=int, help="trainers of the step part, one node each (default 2)")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 3)")
    parser.add_argument("--rebuild-rounds", type=int, help="nodes destroyed, one after another (default 2)")
    parser.add_argument("--steps", type=int, help="timed steps per round and method (default 3)")
    parser.add_argument("--cpu-step-s", type=float, help="length of a CPU-bound step (default 2.0)")
    parser.add_argument("--rest-s", type=float, help="seconds per round that idle daemons are observed (default 30)")
    parser.add_argument("--protect-nodes", type=int, default=6, help="n of the protected group (default 6)")
    parser.add_argument("--parity", type=int, default=2, help="m of the protected group (default 2)")
    parser.add_argument("--no-peers", action="store_true", help="skip torch.distributed.checkpoint")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which of {','.join(PARTS)} to run")
    parser.add_argument("--keep-logs", type=Path, metavar="DIR", help="keep the daemons' and trainers' logs in DIR")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round, to check that everything runs")
    given = parser.parse_args(list(argv))
    parts = tuple(part for part in given.parts.split(",") if part)
    if unknown := set(parts) - set(PARTS):
        raise UsageError(f"unknown part {sorted(unknown)[0]!r}; the parts are {', '.join(PARTS)}", reason="bad_part")
    if not 0 < given.parity < given.protect_nodes:
        raise UsageError(
            f"a group of {given.protect_nodes} nodes cannot hold parity {given.parity}", reason="bad_parity"
        )
    quick = given.quick
    size = _size(given.size) if given.size else (_QUICK_BYTES if quick else 512 * 1024**2)
    return Settings(
        size_bytes=size,
        protect_size_bytes=_size(given.protect_size) if given.protect_size else size,
        ranks=given.ranks or 2,
        rounds=given.rounds or (1 if quick else 3),
        rebuild_rounds=given.rebuild_rounds or (1 if quick else 2),
        steps=given.steps or (2 if quick else 3),
        cpu_step_s=given.cpu_step_s or (0.1 if quick else 2.0),
        rest_s=given.rest_s or (0.5 if quick else 30.0),
        protect_nodes=given.protect_nodes,
        parity=given.parity,
        has_peers=not given.no_peers,
        parts=parts,
        json_path=given.json,
        keep_logs=given.keep_logs,
    )


def _size(text: str) -> int:
    try:
        return max(1, parse_size(text))
    except ValueError as error:
        raise UsageError(f"size {text!r} {error}", reason="bad_size") from None
