"""Identities as certificates state them, and who may do what. Pure: no files, no sockets, no clock.

A certificate carries exactly one URI (SPIFFE's rule): ``spiffe://TRUST_DOMAIN/backstay/node/NAME``,
``spiffe://TRUST_DOMAIN/backstay/coordinator`` or ``spiffe://TRUST_DOMAIN/backstay/operator``. It is compared whole and as it
stands: no prefix, no other case, no trailing slash is ever taken for one of them.
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
    """What a process is to the others."""

    NODE = "node"
    COORDINATOR = "coordinator"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """One process of one cluster. ``name`` is a node's name and "" for the other roles."""

    trust_domain: str
    role: Role
    name: str = ""

    @property
    def uri(self) -> str:
        """As a certificate states it."""
        path = f"{self.role.value}/{self.name}" if self.name else self.role.value
        return f"spiffe://{self.trust_domain}/backstay/{path}"

    def __str__(self) -> str:
        return self.uri


_URI: Final = re.compile(r"spiffe://(?P<domain>[a-z0-9][a-z0-9._-]{0,254})/backstay/(?P<path>[A-Za-z0-9._/-]{1,200})\Z")


def parse(uri: str) -> Identity:
    """The identity that ``uri`` states; raises ConfigError (``no_identity``) when it is none of backstay's."""
    match = _URI.match(uri)
    if match is not None:
        role, slash, name = match["path"].partition("/")
        if role == Role.NODE.value and slash and _is_name(name):
            return Identity(trust_domain=match["domain"], role=Role.NODE, name=name)
        if not slash and role in (Role.COORDINATOR.value, Role.OPERATOR.value):
            return Identity(trust_domain=match["domain"], role=Role(role))
    raise ConfigError(f"{shown(uri)} is no identity of backstay; {_FORMS}", reason="no_identity")


def identify(uris: Iterable[str], *, trust_domain: str) -> Identity:
    """The identity of a certificate with these URIs, which must be of ``trust_domain``.

    Raises:
        ConfigError: ``no_identity``, ``several_identities`` or ``other_trust_domain``; says what was found.
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
            f"{identity} is of trust domain {identity.trust_domain!r}, not of {trust_domain!r}; trust_domain must be the same "
            "everywhere",
            reason="other_trust_domain",
        )
    return identity


def authorise(identity: Identity, roles: Collection[Role], *, doing: str, name: str = "") -> None:
    """Raise ConfigError (``wrong_role``, ``wrong_name``) unless ``identity`` has one of ``roles`` and, if given, ``name``."""
    if identity.role not in roles:
        wanted = " or ".join(sorted(role.value for role in roles)) or "nobody"
        raise ConfigError(
            f"{identity} may not {doing}: its role is {identity.role.value}, which is open to {wanted}; use a certificate "
            "made for that role",
            reason="wrong_role",
        )
    if name and identity.name != name:
        raise ConfigError(
            f"{identity} may not {doing}: it is node {identity.name!r}, not {name!r}; the certificate must be made for "
            "the name that the node has (--name)",
            reason="wrong_name",
        )


def shown(text: str) -> str:
    """What a stranger sent, fit for a message: short, and without characters that steer a terminal."""
    return ascii(text if len(text) <= 120 else text[:117] + "...")


def _is_name(name: str) -> bool:
    try:
        check_name("name", name)
    except UsageError:
        return False
    return True


_FORMS: Final = "expected one URI such as spiffe://TRUST_DOMAIN/backstay/node/NAME, .../coordinator or .../operator"
