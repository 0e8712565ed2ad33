"""A Snapshotter within a framework's callback: one run, restored when the framework has built its model and optimizers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from backstay.snapshotter import RestoreResult, Snapshotter
from backstay.trainer import argument_checks
from backstay.trainer.data import followed_loaders
from backstay.trainer.data.data_position import Place, Position

_log = logging.getLogger("backstay")


class RunKeeper:
    """Base of the callbacks of Lightning and Transformers. ``keeper`` and ``restored`` are set by :meth:`_restore`.

    Args:
        run_id: The training run whose state this is; a new one for a run that starts from scratch.
        allow_fresh: Start over if the run is known but nothing of it can be restored.
        deadline_s: How long restoring may take.
        missing_ok: As of :meth:`backstay.Snapshotter.restore`: names in ``extra`` that the snapshot may lack.
        keep: Keep the run's memory (until ``job_ttl_s``) when training ends well.
        **options: As of :class:`backstay.Snapshotter`: ``job``, ``extra``, ``socket``, ``max_wait_s``, ``strict``...
    """

    def __init__(
        self,
        *,
        run_id: str,
        allow_fresh: bool = False,
        deadline_s: float = 600.0,
        missing_ok: Iterable[str] = (),
        keep: bool = False,
        **options: Any,
    ) -> None:
        self.keeper: Snapshotter | None = None
        self.restored: RestoreResult | None = None
        self._run_id, self._options = run_id, options
        self._extra: Mapping[str, Any] = options.pop("extra", None) or {}
        followed_loaders.refuse(self._extra, type(self).__name__)
        self._allow_fresh, self._deadline_s, self._keep = allow_fresh, deadline_s, keep
        self._missing_ok = argument_checks.names_of("missing_ok", missing_ok)
        self._trainer: Any = None
        self._last_step = 0
        self._position = Position(self._places)

    def _places(self) -> Sequence[Place]:
        """The places of the training's loaders, in an order that is the same after a restart."""
        raise NotImplementedError

    def _restore(self, model: Any, optimizers: Any, extra: Mapping[str, Any]) -> RestoreResult:
        """Keep ``model``, ``optimizers`` and ``extra`` from now on, restored if the run is known; a collective."""
        self.keeper = Snapshotter(
            model, optimizers, run_id=self._run_id, extra={**extra, **self._extra}, **self._options
        )
        restored = self.restored = self.keeper.restore(
            allow_fresh=self._allow_fresh, deadline_s=self._deadline_s, missing_ok=self._missing_ok
        )
        if restored.outcome != "NONE":
            self._position.arm()
            _log.info("backstay: run %s continues after step %d (%s)", self._run_id, restored.step, restored.outcome)
        return restored
