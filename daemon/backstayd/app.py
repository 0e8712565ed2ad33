"""The command ``backstayd``: reads the configuration, sets up logging, hands over to node daemon or coordinator.

An operator's mistake ends in one line on stderr and the error's exit code, never in a stack trace.
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
from backstayd import config, start_checks
from backstayd.printable import say
from backstayd.security.configured import load_credentials
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
    descriptions = {"node": "hold the snapshots of this machine's trainers", "coordinator": "decide, for all nodes"}
    for cls in config.SECTIONS:
        role = roles.add_parser(cls.section, help=descriptions[cls.section], allow_abbrev=False)
        role.add_argument("--config", type=Path, metavar="FILE", help=f"TOML file with a table [{cls.section}]")
        role.add_argument("--check-config", action="store_true", help="check the configuration, print it and exit")
        role.add_argument("--print-default-config", action="store_true", help="print a sample configuration and exit")
        for setting in config.settings(cls):
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
    cls = next(cls for cls in config.SECTIONS if cls.section == arguments.role)
    if arguments.print_default_config:
        print(config.sample(cls), end="")
        return 0
    names = {setting.name for setting in config.settings(cls)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    if cls is config.NodeConfig:
        return _run_node(
            lambda: config.load(config.NodeConfig, file=arguments.config, environ=os.environ, flags=flags), arguments
        )
    return _run_coordinator(
        lambda: config.load(config.CoordinatorConfig, file=arguments.config, environ=os.environ, flags=flags), arguments
    )


def _run_node(load: Callable[[], config.NodeConfig], arguments: argparse.Namespace) -> int:
    settings = load()
    if arguments.check_config:
        return _show(settings)
    logs.configure(level=settings.log_level, form=settings.log_format, component=f"node {settings.name}")
    from backstayd.node.app import run

    return run(settings, load)


def _run_coordinator(load: Callable[[], config.CoordinatorConfig], arguments: argparse.Namespace) -> int:
    settings = load()
    if arguments.check_config:
        return _show(settings)
    logs.configure(level=settings.log_level, form=settings.log_format, component="coordinator")
    from backstayd.coordinator.app import run

    return run(settings, load)


def _show(settings: config.NodeConfig | config.CoordinatorConfig) -> int:
    for setting in config.settings(type(settings)):
        value = getattr(settings, setting.name)
        print(f"{settings.section}.{setting.name} = {setting.default if value is None else value}")
    credentials = load_credentials(settings)
    problem = credentials.validity_problem() if credentials is not None else ""
    if problem:
        raise ConfigError(f"{problem}; renew it", reason="expired")
    if isinstance(settings, config.NodeConfig):
        start_checks.check_node(settings)
    else:
        start_checks.check_coordinator(settings)
    print("configuration is valid")
    return 0
