"""backstay keeps the state of a training run in the memory of the machines that train it.

    keeper = backstay.Snapshotter(model, optimizer, run_id="gpt-7b-3", extra={"scheduler": scheduler, "loader": loader})
    step = keeper.restore().step               # 0 for a run that is provably new; raises rather than guess
    for epoch in range(keeper.values.get("epoch", 0), epochs):
        keeper.values["epoch"] = epoch         # plain values, in each snapshot
        for batch in loader:                   # after a restart: continues with the next batch
            train_one_step(batch)
            step += 1
            keeper.snapshot(step)              # returns at once
    keeper.finish()

Adapters are modules of their own (``backstay.dcp``, ``files``, ``lightning``, ``transformers``, ``accelerate``, ``deepspeed``,
``torchft``, ``torchtitan``); ``backstay.testing`` starts real daemons for a user's tests. Names are loaded when first used
(PEP 562), so that ``import backstay`` loads neither torch nor anything of the daemon.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from backstay._version import __version__
from backstay.errors import (
    BackstayError,
    CapacityError,
    ConfigError,
    IntegrityError,
    InvariantError,
    SnapshotNotFoundError,
    StaleGenerationError,
    UnavailableError,
    UnrecoverableError,
    UsageError,
)

if TYPE_CHECKING:
    from backstay import testing
    from backstay.snapshotter import RestoreResult, SnapshotStatus, Snapshotter, Stats

__all__ = [
    "BackstayError",
    "CapacityError",
    "ConfigError",
    "IntegrityError",
    "InvariantError",
    "RestoreResult",
    "SnapshotNotFoundError",
    "SnapshotStatus",
    "Snapshotter",
    "StaleGenerationError",
    "Stats",
    "UnavailableError",
    "UnrecoverableError",
    "UsageError",
    "__version__",
    "testing",
]

_LAZY = {
    "RestoreResult": "backstay.snapshotter",
    "SnapshotStatus": "backstay.snapshotter",
    "Snapshotter": "backstay.snapshotter",
    "Stats": "backstay.snapshotter",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name == "testing":
        value = importlib.import_module("backstay.testing")
    else:
        raise AttributeError(f"module 'backstay' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
