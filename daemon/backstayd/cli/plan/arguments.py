"""The arguments of `backstay plan`. No logic of its own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from backstay.errors import UsageError
from backstayd.config.schema import MAX_GROUP_NODES
from backstayd.sizing import failures
from backstayd.units import parse_size

LEAST: Final = 1e-9  # of seconds and rates; anything beyond is a typing error
MOST: Final = 1e9
MOST_BYTES: Final = 1 << 70


def add_arguments(plan: argparse.ArgumentParser) -> None:
    """Facts about the cluster and the job."""
    plan.add_argument("--nodes", type=_count, required=True, metavar="N", help="machines the job runs on")
    size = plan.add_mutually_exclusive_group(required=True)
    size.add_argument("--state", type=_size, metavar="SIZE", help="state of the whole job, such as 980GiB")
    size.add_argument("--state-per-node", type=_size, metavar="SIZE", help="or the state of one node")
    size.add_argument(
        "--measure", metavar="MODULE:FUNCTION", default="",
        help="or measure the (model, optimizer) this function returns, created on the meta device in a separate process",
    )  # fmt: skip
    plan.add_argument("--ranks", type=_count, default=0, metavar="N", help="total number of trainer processes")
    plan.add_argument("--memory", type=_size, default=0, metavar="SIZE", help="memory that each node can provide")
    plan.add_argument(
        "--bandwidth", type=_size, default=0, metavar="SIZE", help="network bandwidth of a node per second, one way"
    )
    plan.add_argument("--step-s", type=_positive, default=0.0, metavar="S", help="seconds per step")
    plan.add_argument(
        "--interval", type=_count, default=0, metavar="STEPS", help="steps between snapshots (default: the best)"
    )
    plan.add_argument(
        "--survive", type=_losses, metavar="F",
        help="simultaneous node losses that must always be survived (default 2 with six or more nodes, else 1)",
    )  # fmt: skip
    plan.add_argument("--group-size", type=_group, default=8, metavar="N", help="nodes per group (8)")
    plan.add_argument("--keep", type=_count, default=1, metavar="N", help="protected snapshots kept (1)")
    _add_rates(plan)
    plan.add_argument("--target", type=_share, default=0.9999, metavar="P",
        help="required probability that memory survives from one durable copy to the next (0.9999)")  # fmt: skip
    plan.add_argument("--plot", type=Path, metavar="FILE", help="also draw a plot, .png or .svg (needs matplotlib)")
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_rates(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--node-losses-per-day", type=_rate, default=failures.NODE_LOSSES_PER_NODE_DAY, metavar="R",
        help=f"losses per node (default {failures.NODE_LOSSES_PER_NODE_DAY:.5f}: {failures.SOURCE})",
    )  # fmt: skip
    plan.add_argument(
        "--trainer-failures-per-day", type=_rate, default=failures.TRAINER_FAILURES_PER_NODE_DAY, metavar="R",
        help="failures per node that leave its memory intact "
        f"(default {failures.TRAINER_FAILURES_PER_NODE_DAY:.5f}, the rest of those interruptions)",
    )  # fmt: skip
    plan.add_argument(
        "--nodes-per-domain", type=_count, default=0, metavar="N", help="nodes that fail together, such as a rack"
    )
    plan.add_argument("--domain-failures-per-day", type=_rate, default=0.0, metavar="R", help="failures per domain (0)")
    plan.add_argument("--repair-s", type=_positive, default=600.0, metavar="S",
        help="seconds from a loss until redundancy is restored (600)")  # fmt: skip
    plan.add_argument("--restart-s", type=_positive, default=60.0, metavar="S",
        help="seconds from a failure until the trainers call restore() (60)")  # fmt: skip
    plan.add_argument("--blocked-s", type=_rate, default=0.01, metavar="S",
        help="seconds a snapshot blocks the trainer (0.01; `make bench` measures it)")  # fmt: skip
    plan.add_argument("--checkpoint-s", type=_rate, default=0.0, metavar="S",
        help="seconds a checkpoint to storage stops training; compares with checkpoints alone")  # fmt: skip
    plan.add_argument("--durable-every-s", type=_positive, default=3600.0, metavar="S",
        help="seconds between durable copies (3600)")  # fmt: skip


def _refuse(text: str, what: str) -> UsageError:
    return UsageError(f"{text!r} is not {what}", reason="bad_arguments")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 1_000_000:
        raise _refuse(text, "a number from 1 to 1000000")
    return int(text)


def _losses(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _group(text: str) -> int:
    count = _count(text)
    if not 2 <= count <= MAX_GROUP_NODES:
        raise _refuse(text, f"a group size from 2 to {MAX_GROUP_NODES}")
    return count


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError:
        size = 0
    if not 0 < size <= MOST_BYTES:
        raise _refuse(text, "a size such as 980GiB or 50GB")
    return size


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value != 0 and not LEAST <= value <= MOST:  # also rejects NaN
        raise _refuse(text, f"0 or a number from {LEAST:g} to {MOST:g}")
    return value


def _positive(text: str) -> float:
    value = _rate(text)
    if value == 0:
        raise _refuse(text, "a number above 0")
    return value


def _share(text: str) -> float:
    value = _rate(text)
    if value >= 1:
        raise _refuse(text, "a probability below 1")
    return value
