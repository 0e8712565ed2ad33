"""Whether a node's release can work with this coordinator and with the other nodes that are connected.

Refuses by name; must not look at anything but names and versions.
"""

from __future__ import annotations

from backstay import __version__
from backstay.errors import ConfigError
from backstay.format import versions
from backstay.format.versions import Side, why_apart
from backstayd.core.messages.report import NodeIdentity


class Releases:
    """Which nodes are connected, and of which release. Nodes talk to each other, so each pair must be near."""

    def __init__(self) -> None:
        self._connected: dict[object, Side] = {}

    def admit(self, stream: object, node: NodeIdentity) -> None:
        """Note the node of ``stream``.

        Raises:
            ConfigError: it is more than one minor release away from this coordinator, or from a node that is here.
        """
        found = Side(name=f"node {node.name}", release=node.version, protocol=node.protocol)
        if self._connected.get(stream) == found:
            return
        own = Side(name="this coordinator", release=__version__, protocol=versions.NODE_PROTOCOL)
        others = {side.name: side for side in self._connected.values() if side.name != found.name}
        for side in (own, *others.values()):
            problem = why_apart(side, found)
            if problem:
                raise ConfigError(problem, reason="bad_protocol")
        self._connected[stream] = found

    def leave(self, stream: object) -> None:
        """The stream ended."""
        self._connected.pop(stream, None)
