"""Identities in certificates, and which role may do what. Pure: no files, no sockets, no clock.

A certificate carries exactly one URI (SPIFFE's rule): ``spiffe://TRUST_DOMAIN/backstay/node/NAME``,
``spiffe://TRUST_DOMAIN/backstay/coordinator`` or ``spiffe://TRUST_DOMAIN/backstay/operator``. It must match exactly:
no prefix, other case or trailing slash is accepted.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from backstay.errors import ConfigError, UsageError
from backstay.ids import check_name


class Role(enum.Enum):
    """The role of a process in the cluster."""

    NODE = "node"
    COORDINATOR = "coordinator"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A process of a cluster. ``name`` is a node's name, and "" for the other roles."""

    trust_domain: str
    role: Role
    name: str = ""

    @property
    def uri(self) -> str:
        """The URI in its certificate."""
        path = f"{self.role.value}/{self.name}" if self.name else self.role.value
        return f"spiffe://{self.trust_domain}/backstay/{path}"

    def __str__(self) -> str:
        return self.uri


_URI: Final = re.compile(r"spiffe://(?P<domain>[a-z0-9][a-z0-9._-]{0,254})/backstay/(?P<path>[A-Za-z0-9._/-]{1,200})\Z")


def parse(uri: str) -> Identity:
    """The identity that ``uri`` states; raises ConfigError (``no_identity``) if it is not one of backstay's."""
    match = _URI.match(uri)
    if match is not None:
        role, slash, name = match["path"].partition("/")
        if role == Role.NODE.value and slash and _is_name(name):
            return Identity(trust_domain=match["domain"], role=Role.NODE, name=name)
        if not slash and role in (Role.COORDINATOR.value, Role.OPERATOR.value):
            return Identity(trust_domain=match["domain"], role=Role(role))
    raise ConfigError(f"{shown(uri)} is not a backstay identity; {_FORMS}", reason="no_identity")


def identify(uris: Iterable[str], *, trust_domain: str) -> Identity:
    """The identity of a certificate with these URIs, which must be of ``trust_domain``.

    Raises:
        ConfigError: ``no_identity``, ``several_identities`` or ``other_trust_domain``; the message shows what was found.
    """
    found = list(uris)
    if not found:
        raise ConfigError(f"the certificate states no identity: it has no URI; {_FORMS}", reason="no_identity")
    if len(found) > 1:
        raise ConfigError(
            f"the certificate states {len(found)} identities ({', '.join(map(shown, found[:4]))}); exactly one is accepted",
            reason="several_identities",
        )
    identity = parse(found[0])
    if identity.trust_domain != trust_domain:
        raise ConfigError(
            f"{identity} belongs to trust domain {identity.trust_domain!r}, not {trust_domain!r}; trust_domain must "
            "be the same everywhere",
            reason="other_trust_domain",
        )
    return identity


def authorise(identity: Identity, roles: Collection[Role], *, doing: str, name: str = "") -> None:
    """Raise ConfigError (``wrong_role``, ``wrong_name``) unless ``identity`` has one of ``roles`` and, if given, ``name``."""
    if identity.role not in roles:
        wanted = " or ".join(sorted(role.value for role in roles)) or "nobody"
        raise ConfigError(
            f"{identity} may not {doing}: its role is {identity.role.value}, but only {wanted} may; use a certificate "
            "for that role",
            reason="wrong_role",
        )
    if name and identity.name != name:
        raise ConfigError(
            f"{identity} may not {doing}: it is node {identity.name!r}, not {name!r}; the certificate must be issued for "
            "the node's name (--name)",
            reason="wrong_name",
        )


def shown(text: str) -> str:
    """Untrusted text made safe for a message: short, and without terminal control characters."""
    return ascii(text if len(text) <= 120 else text[:117] + "...")


def _is_name(name: str) -> bool:
    try:
        check_name("name", name)
    except UsageError:
        return False
    return True


_FORMS: Final = "expected one URI such as spiffe://TRUST_DOMAIN/backstay/node/NAME, .../coordinator or .../operator"
