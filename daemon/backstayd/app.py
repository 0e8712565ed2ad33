"""The command ``backstayd``: reads the configuration, sets up logging, hands over to node daemon or coordinator.

An operator's mistake prints one line on stderr and ends with the error's exit code, never with a stack trace.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from backstay import __version__
from backstay.errors import BackstayError, ConfigError, UsageError
from backstayd import start_checks
from backstayd.config.load import load_config
from backstayd.config.reference import sample
from backstayd.config.schema import SECTIONS, Config, CoordinatorConfig, DaemonConfig, NodeConfig, settings
from backstayd.printable import say
from backstayd.security.credentials import load_credentials
from backstayd.telemetry import logs


class CommandParser(argparse.ArgumentParser):
    """Raises UsageError where argparse would exit with status 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)", reason="bad_arguments")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one daemon until SIGTERM or SIGINT; returns the exit status."""
    try:
        arguments = _parser().parse_args(argv)
        return _run(arguments)
    except BackstayError as error:
        say(f"backstayd: {error}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        allow_abbrev=False, prog="backstayd", description="Holds training state in memory, erasure-coded across nodes."
    )
    parser.add_argument("--version", action="version", version=f"backstayd {__version__}")
    roles = parser.add_subparsers(dest="role", required=True, parser_class=CommandParser)
    descriptions = {
        "node": "hold the snapshots of this machine's trainers",
        "coordinator": "coordinate all nodes: protection, recovery and durable copies",
    }
    for cls in SECTIONS:
        role = roles.add_parser(cls.section, help=descriptions[cls.section], allow_abbrev=False)
        role.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file with a table [{cls.section}]")
        role.add_argument("--check-config", action="store_true", help="check the configuration, print it and exit")
        role.add_argument("--print-default-config", action="store_true", help="print a sample configuration and exit")
        for setting in settings(cls):
            is_shown = not (setting.is_computed or setting.is_switch or setting.default == "")
            default = f" Default: {setting.default}." if is_shown else ""
            role.add_argument(
                setting.flag,
                dest=setting.name,
                metavar="true|false" if setting.is_switch else setting.metavar,
                nargs="?" if setting.is_switch else None,
                const="true" if setting.is_switch else None,
                default=argparse.SUPPRESS,
                help=(setting.explanation + default).replace("%", "%%"),
            )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.print_default_config:
        print(sample(next(cls for cls in SECTIONS if cls.section == arguments.role)), end="")
        return 0
    return _run_node(arguments) if arguments.role == NodeConfig.section else _run_coordinator(arguments)


def _run_node(arguments: argparse.Namespace) -> int:
    load = _loader(NodeConfig, arguments)
    config = load()
    if arguments.check_config:
        return _show(config)
    logs.configure(level=config.log_level, form=config.log_format, component=f"node {config.name}")
    from backstayd.node.app import run

    return run(config, load)


def _run_coordinator(arguments: argparse.Namespace) -> int:
    load = _loader(CoordinatorConfig, arguments)
    config = load()
    if arguments.check_config:
        return _show(config)
    logs.configure(level=config.log_level, form=config.log_format, component="coordinator")
    from backstayd.coordinator.app import run

    return run(config, load)


def _loader(cls: type[Config], arguments: argparse.Namespace) -> Callable[[], Config]:
    names = {setting.name for setting in settings(cls)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    return lambda: load_config(cls, file=arguments.config, environ=os.environ, flags=flags)


def _show(config: DaemonConfig) -> int:
    for setting in settings(type(config)):
        value = getattr(config, setting.name)
        print(f"{config.section}.{setting.name} = {setting.default if value is None else value}")
    credentials = load_credentials(config)
    problem = credentials.validity_problem() if credentials is not None else ""
    if problem:
        raise ConfigError(f"{problem}; renew it", reason="expired")
    if isinstance(config, NodeConfig):
        start_checks.check_node(config)
    elif isinstance(config, CoordinatorConfig):
        start_checks.check_coordinator(config)
    print("configuration is valid")
    return 0
