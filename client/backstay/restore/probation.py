"""Watching the first steps after a restore for NaN and infinity: what was restored may be bad though its bytes verify.

Must not stop training, change it, or cost anything once the time is over.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

_log = logging.getLogger("backstay")

MAX_NAMED: Final = 3

Report = Callable[[int, str], bool]  # step, reason: whether the daemon knows it now


class Probation:
    """From one restore until ``steps`` optimizer steps later. ``is_over``: nothing is checked from now on."""

    def __init__(
        self, optimizers: Sequence[Any], names: Mapping[int, str], *, base_step: int, steps: int, report: Report
    ) -> None:
        self.is_over = steps <= 0
        self._base_step, self._steps, self._report = base_step, steps, report
        self._names = names  # id of a parameter -> its name
        self._counts: dict[int, int] = defaultdict(int)  # id of an optimizer -> steps since the restore
        self._handles: list[Any] = []
        guarded = torch.compiler.disable(self._before_step)
        for optimizer in optimizers if not self.is_over else ():
            # A wrapper may inherit the method without torch's constructor.
            if hasattr(optimizer, "_optimizer_step_pre_hooks"):
                self._handles.append(optimizer.register_step_pre_hook(guarded))

    def close(self) -> None:
        """Take the hooks away. Not from within one."""
        self.is_over = True
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def note_step(self, step: int) -> None:
        """``step`` is complete; the probation may be over."""
        if step >= self._base_step + self._steps + 1 or self.is_over:
            self.close()

    def see_loss(self, loss: float | torch.Tensor) -> None:
        """Check a loss (waits for the device if it is there)."""
        if self.is_over:
            return
        value = loss.detach() if isinstance(loss, torch.Tensor) else float(loss)
        value = value._local_tensor if isinstance(value, DTensor) else value
        if isinstance(value, torch.Tensor):
            if not bool(torch.isfinite(value).all().item()):
                self._found(f"the loss is {value.flatten()[0].item() if value.numel() == 1 else 'not finite'}")
        elif not math.isfinite(value):
            self._found(f"the loss is {value}")

    @property
    def _step(self) -> int:
        """The current step."""
        return self._base_step + max(self._counts.values(), default=0) + 1

    def _before_step(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if self.is_over:
            return
        try:
            if _is_skipped_by_scaler(optimizer) or _is_captured():
                return
            if self._counts[id(optimizer)] >= self._steps:
                self.is_over = True
                return
            bad = self._non_finite(optimizer)
            if bad:
                more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
                self._found(f"gradients of {', '.join(bad[:MAX_NAMED])}{more} are not finite")
            self._counts[id(optimizer)] += 1
        except Exception as error:  # noqa: BLE001 - within the user's step: training must continue
            self.is_over = True
            _log.warning("backstay: gradients after the restore cannot be checked (%r); training continues", error)

    def _non_finite(self, optimizer: Any) -> list[str]:
        """Names of the parameters whose gradient has NaN or infinity: one fused reduction and one wait per device."""
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = _local_values(parameter.grad)
                if gradient is not None and gradient.numel():
                    groups[gradient.device, gradient.dtype].append((parameter, gradient))
        bad = []
        with torch.no_grad():
            for pairs in groups.values():
                # the largest magnitude: a sum of squares could overflow where every element is finite
                largest = torch._foreach_norm([gradient for _, gradient in pairs], math.inf)
                is_finite = torch.isfinite(torch.stack(largest)).tolist()
                bad += [
                    self._names.get(id(parameter), "an unnamed parameter")
                    for (parameter, _), good in zip(pairs, is_finite, strict=True)
                    if not good
                ]
        return bad

    def _found(self, what: str) -> None:
        step, self.is_over = self._step, True
        is_known = self._report(step, what)
        known = (
            "it is passed over by the next restore()"
            if is_known
            else "the daemon does not answer and could not be informed"
        )
        _log.warning(
            "backstay: step %d, %d after restoring step %d: %s. The snapshot of step %d is distrusted, with all that is "
            "trained from it: %s. Training continues; if this is harmless, `backstay trust RUN` undoes it",
            step, step - self._base_step, self._base_step, what, self._base_step, known,
        )  # fmt: skip


def _local_values(gradient: torch.Tensor | None) -> torch.Tensor | None:
    """The numbers of a gradient that this rank holds."""
    if gradient is None:
        return None
    local = gradient._local_tensor if isinstance(gradient, DTensor) else gradient
    local = local._values() if local.is_sparse else local
    return torch.view_as_real(local) if local.is_complex() else local


def _is_skipped_by_scaler(optimizer: Any) -> bool:
    """Whether a GradScaler lets a fused optimizer skip this step itself: an overflow is its daily work."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.item())


def _is_captured() -> bool:
    """Within the capture of a CUDA graph nothing can be waited for."""
    return torch.cuda.is_available() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
