"""Which daemon holds the name of each node, as a coordinator sees it: two machines of one name would undo each other.

A daemon that was started again takes its name over: the connections of the one before are closed, or silent for a lease.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from backstay.errors import ConfigError
from backstayd.core.messages.report import NodeIdentity


@dataclass(slots=True)
class _Holder:
    identity: NodeIdentity
    seen_s: float
    streams: set[object] = field(default_factory=set)


class NodeNames:
    """Invariant: the streams of a name are of one incarnation."""

    def __init__(self, *, lease_s: float) -> None:
        self._lease_s = lease_s
        self._holders: dict[str, _Holder] = {}

    def claim(self, identity: NodeIdentity, stream: object, now_s: float) -> None:
        """A report of ``identity`` came on ``stream``; raises ConfigError if the name is another daemon's."""
        holder = self._holders.get(identity.name)
        if holder is not None and holder.identity.incarnation != identity.incarnation:
            if holder.streams - {stream} and now_s - holder.seen_s < self._lease_s:
                raise ConfigError(
                    f"the node name {identity.name!r} is taken: a daemon of that name (incarnation "
                    f"{holder.identity.incarnation}, peers at {holder.identity.bulk_address}) is connected; give this machine "
                    "another with --name",
                    reason="name_taken",
                )
            holder = None
        if holder is None:
            holder = self._holders[identity.name] = _Holder(identity, now_s)
        holder.seen_s = now_s
        holder.streams.add(stream)

    def leave(self, stream: object) -> None:
        """``stream`` has ended."""
        for name in [name for name, holder in self._holders.items() if stream in holder.streams]:
            self._holders[name].streams.discard(stream)
            if not self._holders[name].streams:
                del self._holders[name]
