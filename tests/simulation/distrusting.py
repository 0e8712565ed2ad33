"""What simulated nodes remember of snapshots that must not be restored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backstayd.core.messages.decisions import Distrusted
from backstayd.core.messages.desired import RunDesired

if TYPE_CHECKING:
    from tests.simulation.node import Node, RunMemory, Trainer


def remember_distrust(node: Node, memory: RunMemory, desired: RunDesired) -> None:
    """Keep what the coordinator says, and strike out what an operator trusts again."""
    before = dict(memory.distrusted)
    for item in desired.distrusted:
        memory.distrusted.setdefault(item.snapshot_id, item)
    for snapshot_id in desired.trusted:
        memory.distrusted.pop(snapshot_id, None)
    if memory.distrusted != before:
        node.changed()


def distrust(node: Node, trainer: Trainer) -> Distrusted | None:
    """A trainer saw NaN: what its world restored is remembered here, and reported."""
    memory = node.memory.get(trainer.run)
    decision = memory.decision if memory is not None else None
    if memory is None or decision is None or decision.world_id != trainer.world_id or decision.base is None:
        return None
    base = decision.base
    item = Distrusted(snapshot_id=base.snapshot_id, attempt=base.attempt, step=base.step, reason="nan")
    memory.distrusted[base.snapshot_id] = item
    node.changed()
    return item
