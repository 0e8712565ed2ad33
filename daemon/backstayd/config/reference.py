"""The sample file deploy/config/backstayd.toml and the page docs/configuration.md, generated from the settings."""

from __future__ import annotations

import sys
from typing import Any

from backstayd.config.schema import SECTIONS, DaemonConfig, settings

HEAD = """# Configuration

Generated from the code by `make sample`; do not edit. Settings come from a TOML file (`--config FILE`, which may hold both
tables), the environment and flags; the later wins. An unknown key is an error that names the nearest known one.
`--check-config` prints the resulting settings and reports what a start on this machine would reject (memory directory,
quota, socket, addresses, certificates) without starting anything; `--print-default-config` prints a file with all defaults.
Sizes are written `8GiB` or `500MB`, durations in seconds.
"""
TITLES = {"node": "Node daemons: `backstayd node`", "coordinator": "The coordinator: `backstayd coordinator`"}


def sample(*classes: type[DaemonConfig]) -> str:
    """A TOML file with every setting at its default, each explained; computed ones are commented out."""
    lines = ["# backstayd configuration. Environment (BACKSTAYD_<SECTION>_<NAME>) and flags override this file."]
    for cls in classes:
        lines += ["", f"[{cls.section}]"]
        for setting in settings(cls):
            lines.append(f"# {setting.explanation}")
            lines.append(
                f"# {setting.name} = ..." if setting.is_computed else f"{setting.name} = {_toml(setting.default)}"
            )
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def page() -> str:
    """docs/configuration.md."""
    return "\n".join([HEAD, *(_section(cls) for cls in SECTIONS)])


def _section(cls: type[DaemonConfig]) -> str:
    lines = [
        f"## {TITLES[cls.section]}",
        "",
        f"Table `[{cls.section}]`; variables `BACKSTAYD_{cls.section.upper()}_...`.",
        "",
    ]
    lines += ["| setting | flag | environment | default | meaning |", "| --- | --- | --- | --- | --- |"]
    for setting in settings(cls):
        variable = f"BACKSTAYD_{cls.section.upper()}_{setting.name.upper()}"
        flag = setting.flag if setting.is_switch else f"{setting.flag} {setting.metavar}"
        default = "from the machine" if setting.is_computed else _shown(setting.default)
        cells = (f"`{setting.name}`", f"`{flag}`", f"`{variable}`", default, _escaped(setting.explanation))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _shown(value: Any) -> str:
    if value == "":
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(sample(*SECTIONS) if sys.argv[1:] == ["--sample"] else page(), end="")
