"""The command line of `backstay`: subcommands, their arguments, and the module that runs each. No logic of its own."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from backstay import __version__
from backstay.errors import ConfigError, UsageError
from backstay.protocol.messages import DEFAULT_SOCKET, SOCKET_VARIABLE
from backstayd.app import CommandParser
from backstayd.cli.plan.arguments import add_arguments as add_plan_arguments
from backstayd.config.values import parse_trust_domain
from backstayd.units import parse_size

DEFAULT_COORDINATOR: Final = "127.0.0.1:7070"
MAX_DAYS: Final = 36_500  # of a certificate

RUN_HELP: Final = "job/run_id, or a run_id that only one job has"

# Which module of this package runs a subcommand, where it is not the one of its name.
_MODULES: Final = {
    "distrust": "orders",
    "drain": "orders",
    "forget": "orders",
    "trust": "orders",
    "export": "convert.export",
    "import": "convert.import_checkpoint",
    "doctor": "doctor.command",
    "plan": "plan.command",
}


def dispatch(argv: Sequence[str]) -> int:
    """Run the subcommand that ``argv`` names; raises BackstayError."""
    if argv and argv[0] == "demo":
        return _run_demo(argv[1:])
    arguments = _parser().parse_args(argv)
    module = _MODULES.get(arguments.command, arguments.command)
    return int(importlib.import_module(f"backstayd.cli.{module}").run(arguments))


def _run_demo(argv: Sequence[str]) -> int:
    """The demo reads its own arguments; ConfigError when the packages it trains with are not installed."""
    missing = [name for name in ("torch", "numpy", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"this needs {', '.join(missing)}: pip install 'backstay[torch,test]'", reason="missing_package"
        )
    return int(importlib.import_module("backstay.testing.demo").main(list(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="backstay", description="Inspect and manage in-memory training snapshots.", allow_abbrev=False
    )
    parser.add_argument(
        "--version", action="version", version=f"backstay {__version__}, Python {sys.version.split()[0]}"
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser, metavar="COMMAND")

    def command(name: str, explanation: str, *, timeout_s: float = 5.0) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=explanation, description=explanation, allow_abbrev=False)
        added.add_argument(
            "--coordinator",
            metavar="HOST:PORT[,...]",
            default=os.environ.get("BACKSTAY_COORDINATOR", DEFAULT_COORDINATOR),
            help=f"the coordinator, or all of an election (default: BACKSTAY_COORDINATOR or {DEFAULT_COORDINATOR})",
        )
        added.add_argument("--json", action="store_true", help="print JSON")
        added.add_argument(
            "--timeout-s", type=_positive, default=timeout_s, metavar="S", help=f"longest wait ({timeout_s:g})"
        )
        _add_security(added)
        return added

    status = command("status", "whether each job would survive the next failure; nodes, redundancy, recent events")
    status.add_argument(
        "--watch", action="store_true", help="keep showing it until Ctrl-C; without a terminal, print changes"
    )
    status.add_argument("--nodes", action="store_true", help="list every node, even if there are many")
    status.add_argument(
        "--timeline",
        type=int,
        default=10,
        metavar="N",
        help="how many events to show (default 10), without those of every snapshot; --json has all",
    )
    snapshots = command("snapshots", "list the snapshots in memory, their state, and where their shards are")
    snapshots.add_argument("run", nargs="?", metavar="RUN", help="job/run_id (default: all runs)")
    explain = command("explain", "show what a restart of RUN would restore now, and from where")
    explain.add_argument("run", metavar="RUN", help=RUN_HELP)
    report = command("report", "show what interruptions cost RUN: goodput, and what was lost when and why")
    report.add_argument("run", nargs="?", metavar="RUN", help="job/run_id or run_id (default: all runs)")
    forget = command("forget", "delete RUN from the memory of every node; its state is lost")
    forget.add_argument("run", metavar="RUN", help=RUN_HELP)
    distrust = command("distrust", "never again restore STEP of RUN, nor any snapshot trained from it")
    distrust.add_argument("run", metavar="RUN", help=RUN_HELP)
    distrust.add_argument("step", type=int, metavar="STEP", help="the step of the snapshot")
    distrust.add_argument("--reason", required=True, metavar="TEXT", help="why, for whoever reads it later")
    trust = command("trust", "undo every distrust of RUN and reset its count of restores")
    trust.add_argument("run", metavar="RUN", help=RUN_HELP)
    drain = command("drain", "move protection away from NODE and report when it may be stopped", timeout_s=600.0)
    drain.add_argument("node", metavar="NODE", help="the node's name in `backstay status`")
    drain.add_argument("--undo", action="store_true", help="cancel the drain: use the node again")
    drain.add_argument(
        "--wait", action="store_true", help="wait until the node may be stopped, at most --timeout-s (600)"
    )
    _add_export(command("export", "write the model in a snapshot of RUN as Hugging Face safetensors"))
    _add_import(command("import", "turn a foreign checkpoint into the first snapshot of RUN, on durable storage"))
    _add_doctor(command("doctor", "check this machine and its daemon; exit status 1 if a check fails"))
    sizing = "compute which parity, memory and interval a cluster needs"
    add_plan_arguments(commands.add_parser("plan", help=sizing, description=sizing, allow_abbrev=False))
    certs = "create a small certificate authority, and certificates for daemons and operators"
    _add_certs(commands.add_parser("certs", help=certs, description=certs, allow_abbrev=False))
    # Listed for --help; dispatch() hands it on before this parser sees it.
    commands.add_parser("demo", help="inject faults into a real training run and watch it recover", add_help=False)
    return parser


def _add_security(command: argparse.ArgumentParser) -> None:
    for name, what in (
        ("cert", "the operator's certificate"),
        ("key", "its private key"),
        ("ca", "the authorities that peers' certificates must be signed by"),
    ):
        variable = f"BACKSTAY_TLS_{name.upper()}"
        path = os.environ.get(variable)
        command.add_argument(
            f"--tls-{name}", type=Path, metavar="FILE", default=Path(path) if path else None,
            help=f"{what}, PEM (default: {variable})",
        )  # fmt: skip
    domain = os.environ.get("BACKSTAY_TRUST_DOMAIN") or "backstay"
    command.add_argument(
        "--trust-domain", default=domain, metavar="NAME", help=f"trust domain of all identities ({domain})"
    )
    command.add_argument(
        "--insecure",
        action=argparse.BooleanOptionalAction,
        default=os.environ.get("BACKSTAY_INSECURE", "").lower() in ("true", "1", "yes"),
        help="connect to the coordinator in plaintext (default: BACKSTAY_INSECURE)",
    )


def _add_certs(certs: argparse.ArgumentParser) -> None:
    certs.add_argument(
        "--ca-dir", type=Path, required=True, metavar="DIR", help="directory of the authority; created if missing"
    )
    certs.add_argument(
        "--node", action="extend", nargs="+", default=[], metavar="NAME", help="make certificates for these nodes"
    )
    certs.add_argument("--coordinator", action="store_true", help="make one for coordinators")
    certs.add_argument("--operator", action="store_true", help="make one for operators (people and programs)")
    certs.add_argument("--days", type=_days, default=365.0, metavar="N", help="days the certificates are valid (365)")
    certs.add_argument(
        "--host", action="append", default=[], metavar="NAME",
        help="DNS name or IP address to include in the certificates, which http_tls needs; repeatable",
    )  # fmt: skip
    certs.add_argument(
        "--trust-domain",
        type=_trust_domain,
        default="backstay",
        metavar="NAME",
        help="trust domain of the identities (backstay)",
    )
    certs.add_argument("--json", action="store_true", help="print JSON")


def _days(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_DAYS:
        raise UsageError(f"--days {text!r} is not a number above 0, up to {MAX_DAYS}", reason="bad_arguments")
    return value


def _trust_domain(text: str) -> str:
    try:
        return parse_trust_domain(text)
    except ValueError as error:
        raise UsageError(f"--trust-domain {text!r} {error}", reason="bad_arguments") from None


def _add_export(export: argparse.ArgumentParser) -> None:
    socket = os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET
    export.add_argument("run", metavar="RUN", help=RUN_HELP)
    export.add_argument(
        "--to", type=Path, required=True, metavar="DIR", help="directory for the model; must not contain one"
    )
    export.add_argument("--step", type=_step, default=0, metavar="N", help="step of the snapshot (default: the newest)")
    export.add_argument(
        "--from", dest="source", default="", metavar="URL", help="read from this persist_url instead of memory"
    )
    export.add_argument(
        "--prefix",
        default="model.",
        help="write the tensors with this prefix, which is stripped from their names (model.)",
    )
    export.add_argument(
        "--file-size", type=_size, default=5_000_000_000, metavar="SIZE", help="most bytes per file (5GB)"
    )
    export.add_argument("--socket", type=Path, default=Path(socket), help=f"the daemon's socket (default {socket})")


def _add_import(importing: argparse.ArgumentParser) -> None:
    importing.add_argument("run", metavar="RUN", help="full job/run_id of a run without snapshots")
    importing.add_argument(
        "--from", dest="source", type=Path, required=True, metavar="DIR", help="directory of the checkpoint"
    )
    importing.add_argument("--to", required=True, metavar="URL", help="the coordinator's persist_url")
    importing.add_argument(
        "--format", default="", choices=("", "huggingface", "dcp", "universal"), metavar="KIND",
        help="huggingface, dcp or universal (DeepSpeed) (default: detected)",
    )  # fmt: skip
    importing.add_argument(
        "--step", type=_step, default=-1, metavar="N", help="step of the checkpoint, if its name does not contain it"
    )
    importing.add_argument(
        "--dtype", default="", help="convert the model's floating-point tensors to this type, such as bfloat16"
    )
    importing.add_argument("--model-prefix", metavar="TEXT", help="prefix of the model's names in a DCP checkpoint")
    importing.add_argument(
        "--work-dir", type=Path, metavar="DIR", help="directory for the converted shards (default: TMPDIR)"
    )


def _step(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"{text!r} is not a step", reason="bad_arguments")
    return int(text)


def _size(text: str) -> int:
    try:
        return max(1, parse_size(text))
    except ValueError as error:
        raise UsageError(f"--file-size {text!r} {error}", reason="bad_arguments") from None


def _add_doctor(doctor: argparse.ArgumentParser) -> None:
    socket = os.environ.get(SOCKET_VARIABLE) or DEFAULT_SOCKET
    doctor.add_argument("--memory-dir", type=Path, metavar="DIR", help="the daemon's memory directory")
    doctor.add_argument("--socket", type=Path, default=Path(socket), help=f"the daemon's socket (default {socket})")
    doctor.add_argument(
        "--address",
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="address that the daemon will bind; repeatable",
    )
    doctor.add_argument(
        "--collective-timeout-s", type=_positive, metavar="S", help="the trainer's torch.distributed timeout"
    )
    doctor.add_argument(
        "--restore-deadline-s",
        type=_positive,
        default=600.0,
        metavar="S",
        help="the trainer's deadline of restore() (600)",
    )


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"{text!r} is not a positive number of seconds", reason="bad_arguments")
    return value
