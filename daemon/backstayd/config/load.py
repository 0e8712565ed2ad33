"""Reads the settings of one role: TOML < environment < flags. Starts nothing and touches no path but the file.

One file may hold both tables, ``[node]`` and ``[coordinator]``; ``BACKSTAYD_NODE_LEASE_S`` is ``lease_s`` of ``[node]``.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backstay.errors import ConfigError
from backstayd.config.schema import SECTIONS, Config, DaemonConfig, check_security, settings

# Kubernetes writes these for every Service of its namespace; they are not ours.
_SERVICE_VARIABLE = re.compile(r"(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_\d+_(TCP|UDP|SCTP)(_.+)?)?)\Z")


def load_config(
    cls: type[Config], *, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, str]
) -> Config:
    """Settings of one role from a TOML file (or None), the environment and flags (field name to text); the later wins.

    Raises:
        ConfigError: for an unreadable file, an unknown key, a value that is not of its kind (names source and key), or
            neither TLS nor ``insecure``.
    """
    found: dict[str, tuple[Any, str]] = {}
    if file is not None:
        found |= {
            name: (value, f"{file}: [{cls.section}] {name}") for name, value in _read_file(file, cls.section).items()
        }
    found |= _read_environment(environ, cls)
    names = {setting.name: setting.flag for setting in settings(cls)}
    found |= {name: (value, names[name]) for name, value in flags.items()}
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in found:
            value, where = found[field.name]
            try:
                values[field.name] = field.metadata["parse"](value)
            except ValueError as error:
                raise ConfigError(f"{where} = {value!r} {error}", reason="bad_value") from None
    loaded = cls(**values)
    check_security(loaded)
    return loaded


def _read_file(file: Path, section: str) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}", reason="unreadable_file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{file} is not TOML: {error}", reason="bad_file") from None
    for cls in SECTIONS:
        table = document.get(cls.section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {cls.section} is not a table; write [{cls.section}]", reason="bad_file")
        known = [setting.name for setting in settings(cls)]
        for key in table:
            if key not in known:
                raise _misplaced(f"{file}: [{cls.section}] {key}", key) or _unknown(
                    f"{file}: [{cls.section}] {key}", key, known
                )
    sections = [cls.section for cls in SECTIONS]
    for key in document:
        if key not in sections:
            raise _misplaced(f"{file}: {key}", key) or _unknown(f"{file}: {key}", key, sections)
    return dict(document.get(section, {}))


def _read_environment(environ: Mapping[str, str], cls: type[DaemonConfig]) -> dict[str, tuple[Any, str]]:
    prefix = f"BACKSTAYD_{cls.section.upper()}_"
    known = {setting.name.upper(): setting.name for setting in settings(cls)}
    found: dict[str, tuple[Any, str]] = {}
    for variable, value in environ.items():
        key = variable.removeprefix(prefix)
        if not variable.startswith(prefix) or (key not in known and _SERVICE_VARIABLE.match(key)):
            continue
        if key not in known:
            raise _unknown(f"environment: {variable}", key, list(known), prefix)
        found[known[key]] = (value, f"environment: {variable}")
    return found


def _misplaced(where: str, key: str) -> ConfigError | None:
    """The error for a setting that stands in a section of another role, or in none; None if no role has it."""
    owners = [f"[{cls.section}]" for cls in SECTIONS if key in {setting.name for setting in settings(cls)}]
    if not owners:
        return None
    return ConfigError(f"{where} is a setting of {' and '.join(owners)}; move it there", reason="wrong_section")


def _unknown(where: str, key: str, known: list[str], prefix: str = "") -> ConfigError:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return ConfigError(f"{where} is not a setting; the nearest one is {prefix}{nearest[0]}", reason="unknown_key")
