"""Hands a subcommand over to a module of ``backstay.testing``, or says in one line what to install for it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from backstay.errors import ConfigError


def run_testing(module: str, argv: Sequence[str]) -> int:
    """Call ``main(argv)`` of ``module``; ConfigError when the packages it trains with are not installed."""
    missing = [name for name in ("torch", "numpy", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"this needs {', '.join(missing)}: pip install 'backstay[torch,test]'", reason="missing_package"
        )
    return int(importlib.import_module(module).main(list(argv)))
