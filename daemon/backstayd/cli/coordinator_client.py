"""How subcommands reach the coordinator: connection and certificates, its status document, one run of it.

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
    """A client of the coordinator that ``arguments`` name, with their TLS settings.

    Raises:
        ConfigError: neither certificates nor --insecure were given. UsageError: invalid address. UnavailableError: a call got
            no answer; the message says what the operator can do.
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
        raise ConfigError(
            f"{problem}; make a new one with `backstay certs --ca-dir DIR --operator`", reason="we_expired"
        )
    return credentials


def _check_security(arguments: argparse.Namespace) -> None:
    files = {"--tls-cert": arguments.tls_cert, "--tls-key": arguments.tls_key, "--tls-ca": arguments.tls_ca}
    missing = [flag for flag, path in files.items() if not path]
    if arguments.insecure:
        if len(missing) < len(files):
            raise ConfigError("both TLS and --insecure were given; remove one of them", reason="two_securities")
        return
    if missing:
        raise ConfigError(
            f"TLS is required; missing: {', '.join(missing)} (or BACKSTAY_TLS_CERT, BACKSTAY_TLS_KEY, "
            "BACKSTAY_TLS_CA). Make certificates with `backstay certs --ca-dir DIR --operator`; for a coordinator that speaks "
            "plaintext give --insecure (BACKSTAY_INSECURE=true)",
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
            f"{error}\nAn election takes up to election_lease_s (default 9 s): try again, or wait longer with "
            f"--timeout-s. If none leads then, check that coordinators reach etcd or the Kubernetes API. Training continues.",
            reason=error.reason,
        )
    return UnavailableError(
        f"{error}\nStart one with `backstayd coordinator`, or give its address with --coordinator HOST:PORT or "
        f"BACKSTAY_COORDINATOR (several separated by commas). Training continues without it; a restore waits for it.",
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
        SnapshotNotFoundError: no such run; the message lists the known ones.
        UsageError: several jobs have a run of that name.
    """
    runs: list[dict[str, Any]] = document["runs"]
    exact = [run for run in runs if run["run"] == name]
    found = exact or [run for run in runs if run["run"].partition("/")[2] == name]
    if len(found) > 1:
        raise UsageError(f"several jobs have a run {name}; give one of: {', '.join(run['run'] for run in found)}")
    if not found:
        known = ", ".join(sorted(run["run"] for run in runs)) or "none"
        settled = (
            ""
            if document.get("is_settled", True)
            else "; the coordinator has just started and some nodes have not reported yet"
        )
        raise SnapshotNotFoundError(f"unknown run {name}; known: {known}{settled}", reason="unknown_run")
    return found[0]
