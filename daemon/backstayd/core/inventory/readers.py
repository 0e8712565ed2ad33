"""Who reads a decided snapshot how: whole shards by the ranks that wrote them, or chunks by ranks of another layout. Pure."""

from __future__ import annotations

from backstayd.core.messages.decisions import Decision


def base_size(decision: Decision) -> int:
    """How many ranks wrote what the decision restores."""
    return (decision.base.world_size if decision.base is not None else 0) or decision.world_size


def readers_of(decision: Decision) -> dict[int, str]:
    """The node that reads each shard of the base, if its own rank does; none: any host may read of any."""
    if base_size(decision) != decision.world_size:
        return {}
    return {place.rank: place.node for place in decision.placements}


def takes_whole(decision: Decision, *, rank: int, layout: str) -> bool:
    """Whether a rank that holds its tensors as ``layout`` says reads whole shards, its own above all, and needs no offer.

    "" is a layout nobody knows: such a shard, and a trainer that says nothing, are taken for alike.
    """
    if decision.base is None:
        return True
    if base_size(decision) != decision.world_size:
        return False
    written = next((source.layout for source in decision.sources if source.rank == rank), "")
    return not layout or not written or layout == written
