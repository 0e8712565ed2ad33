"""The coordinator as the subcommands reach it: connection and certificates, its status document, one run of it.

Everything about the wire is in ``backstayd.transport``.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from backstay.errors import ConfigError, SnapshotNotFoundError, UnavailableError, UsageError
from backstay.ids import RunKey
from backstayd.addresses import split_addresses

if TYPE_CHECKING:
    from backstayd.security.credentials import Credentials
    from backstayd.transport.operator import OperatorClient

Document = dict[str, Any]


@contextlib.contextmanager
def connect(arguments: argparse.Namespace) -> Iterator[OperatorClient]:
    """A client of the coordinator that ``arguments`` name, with what they say about TLS.

    Raises:
        ConfigError: neither certificates nor --insecure were given. UsageError: the address is none. UnavailableError: a call
            got no answer; says what the operator can do.
    """
    from backstayd.transport.operator import OperatorClient

    credentials = _credentials(arguments)
    try:
        addresses = ",".join(split_addresses(arguments.coordinator))
    except ValueError as error:
        raise UsageError(f"--coordinator {arguments.coordinator!r} {error}", reason="bad_arguments") from None
    with OperatorClient(addresses, timeout_s=arguments.timeout_s, credentials=credentials) as client:
        try:
            yield client
        except UnavailableError as error:
            raise _unreachable(error) from error


def _credentials(arguments: argparse.Namespace) -> Credentials | None:
    """The operator's certificate, checked; None for plaintext. Raises ConfigError."""
    from backstayd.security.credentials import Credentials, TlsFiles
    from backstayd.security.identity import Role

    _check_security(arguments)
    if arguments.insecure:
        return None
    files = TlsFiles(cert=arguments.tls_cert, key=arguments.tls_key, ca=arguments.tls_ca)
    credentials = Credentials(files, trust_domain=arguments.trust_domain, role=Role.OPERATOR)
    problem = credentials.validity_problem()
    if problem:
        raise ConfigError(f"{problem}; make another with `backstay certs --ca-dir DIR --operator`", reason="we_expired")
    return credentials


def _check_security(arguments: argparse.Namespace) -> None:
    files = {"--tls-cert": arguments.tls_cert, "--tls-key": arguments.tls_key, "--tls-ca": arguments.tls_ca}
    missing = [flag for flag, path in files.items() if not path]
    if arguments.insecure:
        if len(missing) < len(files):
            raise ConfigError("both TLS and --insecure were given; take one away", reason="two_securities")
        return
    if missing:
        raise ConfigError(
            f"calls are made over TLS; not given: {', '.join(missing)} (or BACKSTAY_TLS_CERT, BACKSTAY_TLS_KEY, "
            "BACKSTAY_TLS_CA). `backstay certs --ca-dir DIR --operator` makes them; for a coordinator that speaks "
            "plaintext say --insecure (BACKSTAY_INSECURE=true)",
            reason="no_security",
        )


def get_status(arguments: argparse.Namespace, *, is_brief: bool = False) -> Document:
    """The status document of the coordinator that ``arguments`` name."""
    with connect(arguments) as client:
        return client.get_status(is_brief=is_brief)


def _unreachable(error: UnavailableError) -> UnavailableError:
    """The same error with what the operator can do about it."""
    if error.reason == "not_leader":
        return UnavailableError(
            f"{error}\nAn election takes up to election_lease_s (9 s unless set): try again, or wait for it with "
            f"--timeout-s. Longer: does etcd or the Kubernetes API answer the coordinators? Training goes on without.",
            reason=error.reason,
        )
    return UnavailableError(
        f"{error}\nStart one with `backstayd coordinator`, or name another with --coordinator HOST:PORT or "
        f"BACKSTAY_COORDINATOR (several with commas between). Training goes on without it; a restore waits for it.",
        reason=error.reason,
    )


def full_name(client: OperatorClient, name: str) -> str:
    """``name`` as job/run_id; a run_id alone is looked up at the coordinator. Raises as :func:`find_run`."""
    if "/" in name:
        return str(RunKey.parse(name))
    return str(find_run(client.get_status(is_brief=True), name)["run"])


def find_run(document: Document, name: str) -> dict[str, Any]:
    """The run called ``name`` (``job/run_id``, or a run_id that only one job has).

    Raises:
        SnapshotNotFoundError: no such run; names those that are known.
        UsageError: several jobs have a run of that name.
    """
    runs: list[dict[str, Any]] = document["runs"]
    exact = [run for run in runs if run["run"] == name]
    found = exact or [run for run in runs if run["run"].partition("/")[2] == name]
    if len(found) > 1:
        raise UsageError(f"{name} is a run of several jobs; say which: {', '.join(run['run'] for run in found)}")
    if not found:
        known = ", ".join(sorted(run["run"] for run in runs)) or "none at all"
        settled = (
            ""
            if document.get("is_settled", True)
            else "; the coordinator has just started and nodes may be missing yet"
        )
        raise SnapshotNotFoundError(f"no node knows a run {name}; known: {known}{settled}", reason="unknown_run")
    return found[0]
