"""State that modules keep out of parameters and buffers, which snapshots do not have: said, not captured.

Must not call a module's own code: what it gives may need pickle, or wait for a device.
"""

from __future__ import annotations

import logging

from torch import nn

_log = logging.getLogger("backstay")


def warn(model: nn.Module) -> None:
    """Name the modules that have a ``get_extra_state()`` of their own (FP8 scales, counters)."""
    found = [
        name or "(root)"
        for name, module in model.named_modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        _log.warning(
            "backstay: %s%s have a get_extra_state(), which is not captured: after a restore it is as the script made it. If "
            "training depends on it, pass extra={...} with an object whose state_dict() and load_state_dict() keep it",
            ", ".join(found[:3]),
            more,
        )
