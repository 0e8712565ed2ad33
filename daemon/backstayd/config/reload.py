"""Reloads the settings of a running daemon: applies those that may change live and names those that need a restart.

All or nothing: settings that cannot be read change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic

from backstayd.config.schema import Config, settings


class Reloader(Generic[Config]):
    """Holds the current settings.

    Args:
        load: Reads the settings as at the start; raises ConfigError.
        apply: Applies settings of which only those in ``live`` differ from the previous ones.
    """

    def __init__(self, settings: Config, *, load: Callable[[], Config], apply: Callable[[Config], None]) -> None:
        self.settings: Config = settings
        self._load: Callable[[], Config] = load
        self._apply: Callable[[Config], None] = apply

    def __call__(self) -> str:
        """Reload; returns the outcome as a sentence for the log. On ConfigError nothing has changed."""
        found = self._load()
        names = [setting.name for setting in settings(type(found))]
        changed = [name for name in names if getattr(found, name) != getattr(self.settings, name)]
        live = {name: getattr(found, name) for name in changed if name in found.live}
        waiting = [name for name in changed if name not in found.live]
        if live:
            new = dataclasses.replace(self.settings, **live)
            self._apply(new)
            self.settings = new
        taken = ", ".join(f"{name} = {value!r}" for name, value in live.items())
        parts = [f"applied {taken}"] if live else []
        parts += [f"needs a restart: {', '.join(waiting)}"] if waiting else []
        return "; ".join(parts) or "no setting has changed"
