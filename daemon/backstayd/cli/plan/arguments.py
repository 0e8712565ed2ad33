"""The arguments of `backstay plan`. No logic of its own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from backstay.errors import UsageError
from backstayd.config.schema import MAX_GROUP_NODES
from backstayd.sizing import failures
from backstayd.units import parse_size

LEAST: Final = 1e-9  # of seconds and rates: what is beyond is a slip of the keyboard
MOST: Final = 1e9
MOST_BYTES: Final = 1 << 70


def add_arguments(plan: argparse.ArgumentParser) -> None:
    """What is known of the cluster and the job."""
    plan.add_argument("--nodes", type=_count, required=True, metavar="N", help="machines the job runs on")
    size = plan.add_mutually_exclusive_group(required=True)
    size.add_argument("--state", type=_size, metavar="SIZE", help="state of the whole job, such as 980GiB")
    size.add_argument("--state-per-node", type=_size, metavar="SIZE", help="or of one node")
    size.add_argument(
        "--measure", metavar="MODULE:FUNCTION", default="",
        help="or measure what this function returns, (model, optimizer), made on the meta device in a process of its own",
    )  # fmt: skip
    plan.add_argument("--ranks", type=_count, default=0, metavar="N", help="trainer processes in all")
    plan.add_argument("--memory", type=_size, default=0, metavar="SIZE", help="memory that a node can give")
    plan.add_argument(
        "--bandwidth", type=_size, default=0, metavar="SIZE", help="network of a node per second, one way"
    )
    plan.add_argument("--step-s", type=_positive, default=0.0, metavar="S", help="seconds per step")
    plan.add_argument(
        "--interval", type=_count, default=0, metavar="STEPS", help="a snapshot every so many steps (default: the best)"
    )
    plan.add_argument(
        "--survive", type=_losses, metavar="F",
        help="nodes lost at once that must be survived for certain (default 2 from six nodes on, else 1)",
    )  # fmt: skip
    plan.add_argument("--group-size", type=_group, default=8, metavar="N", help="nodes of a group (8)")
    plan.add_argument("--keep", type=_count, default=1, metavar="N", help="protected snapshots kept (1)")
    _add_rates(plan)
    plan.add_argument("--target", type=_share, default=0.9999, metavar="P",
        help="wanted probability that memory survives from one durable copy to the next (0.9999)")  # fmt: skip
    plan.add_argument("--plot", type=Path, metavar="FILE", help="draw it as well, .png or .svg (needs matplotlib)")
    plan.add_argument("--json", action="store_true", help="print JSON for programs")


def _add_rates(plan: argparse.ArgumentParser) -> None:
    plan.add_argument(
        "--node-losses-per-day", type=_rate, default=failures.NODE_LOSSES_PER_NODE_DAY, metavar="R",
        help=f"of one node (default {failures.NODE_LOSSES_PER_NODE_DAY:.5f}: {failures.SOURCE})",
    )  # fmt: skip
    plan.add_argument(
        "--trainer-failures-per-day", type=_rate, default=failures.TRAINER_FAILURES_PER_NODE_DAY, metavar="R",
        help=f"per node, its memory stays (default {failures.TRAINER_FAILURES_PER_NODE_DAY:.5f}, the rest of those)",
    )  # fmt: skip
    plan.add_argument(
        "--nodes-per-domain", type=_count, default=0, metavar="N", help="nodes that fail together: a rack"
    )
    plan.add_argument("--domain-failures-per-day", type=_rate, default=0.0, metavar="R", help="of one such domain (0)")
    plan.add_argument("--repair-s", type=_positive, default=600.0, metavar="S",
        help="from a loss until redundancy is back (600)")  # fmt: skip
    plan.add_argument("--restart-s", type=_positive, default=60.0, metavar="S",
        help="from a failure until the trainers ask to restore (60)")  # fmt: skip
    plan.add_argument("--blocked-s", type=_rate, default=0.01, metavar="S",
        help="what a snapshot costs the trainer (0.01; `make bench` measures it)")  # fmt: skip
    plan.add_argument("--checkpoint-s", type=_rate, default=0.0, metavar="S",
        help="how long a checkpoint to storage stops training: shows what checkpoints alone would give")  # fmt: skip
    plan.add_argument("--durable-every-s", type=_positive, default=3600.0, metavar="S",
        help="between durable copies (3600)")  # fmt: skip


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
    if value != 0 and not LEAST <= value <= MOST:  # NaN is refused, too
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
