"""Reading the settings again while a daemon runs: what may change is taken over, of the rest it is said that it waits.

All or nothing: settings that cannot be read change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Generic

from backstayd.config.schema import Config


class Reloader(Generic[Config]):
    """Holds the settings in force.

    Args:
        load: Reads the settings as at the start; raises ConfigError.
        apply: Brings settings into force of which only those in ``live`` differ from the ones before.
    """

    def __init__(self, settings: Config, *, load: Callable[[], Config], apply: Callable[[Config], None]) -> None:
        self.settings: Config = settings
        self._load: Callable[[], Config] = load
        self._apply: Callable[[Config], None] = apply

    def __call__(self) -> str:
        """Read again; returns what came of it as a sentence for the log. Raises ConfigError, then nothing is changed."""
        found = self._load()
        changed = [
            field.name
            for field in dataclasses.fields(found)
            if getattr(found, field.name) != getattr(self.settings, field.name)
        ]
        live = {name: getattr(found, name) for name in changed if name in found.live}
        waiting = [name for name in changed if name not in found.live]
        if live:
            settings = dataclasses.replace(self.settings, **live)
            self._apply(settings)
            self.settings = settings
        taken = ", ".join(f"{name} = {value!r}" for name, value in live.items())
        parts = [f"took over {taken}"] if live else []
        parts += [f"needs a restart: {', '.join(waiting)}"] if waiting else []
        return "; ".join(parts) or "no setting has changed"
