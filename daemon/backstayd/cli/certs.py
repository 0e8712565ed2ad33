"""`backstay certs`: a small authority, and certificates for nodes, coordinators and operators. Writes only to --ca-dir."""

from __future__ import annotations

import argparse
import datetime as dt

from backstay.errors import UsageError
from backstay.ids import check_name
from backstayd.cli.tables import as_json, table
from backstayd.printable import say
from backstayd.security.authority import Authority, Issued
from backstayd.security.identity import Identity, Role


def run(arguments: argparse.Namespace) -> int:
    identities = _identities(arguments)
    authority = Authority(arguments.ca_dir)
    lifetime = dt.timedelta(days=arguments.days)
    issued = []
    for identity in identities:
        directory = arguments.ca_dir / identity.role.value / identity.name
        issued.append(authority.issue(identity, directory, lifetime=lifetime, hosts=arguments.host))
    if arguments.json:
        say(as_json({"ca": str(authority.directory / "ca.crt"), "issued": [_row(one) for one in issued]}))
        return 0
    made = "created" if authority.is_new else "used"
    say(f"{made} the authority in {authority.directory}; ca.key must not leave that directory\n")
    rows = [(one.identity.uri, f"{one.not_after:%Y-%m-%d}", f"{one.directory}/") for one in issued]
    say(table(("IDENTITY", "VALID UNTIL", "tls.crt, tls.key AND ca.crt IN"), rows))
    return 0


def _identities(arguments: argparse.Namespace) -> list[Identity]:
    domain = arguments.trust_domain
    found = [Identity(trust_domain=domain, role=Role.NODE, name=check_name("name", name)) for name in arguments.node]
    if arguments.coordinator:
        found.append(Identity(trust_domain=domain, role=Role.COORDINATOR))
    if arguments.operator:
        found.append(Identity(trust_domain=domain, role=Role.OPERATOR))
    if not found:
        raise UsageError("nothing to make: give --node NAME, --coordinator or --operator", reason="bad_arguments")
    return found


def _row(issued: Issued) -> dict[str, str]:
    return {
        "identity": issued.identity.uri,
        "not_after": issued.not_after.isoformat(),
        "tls_cert": str(issued.cert),
        "tls_key": str(issued.key),
        "tls_ca": str(issued.ca),
    }
