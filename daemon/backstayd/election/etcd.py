"""The lease record as one key in etcd, over its HTTP gateway: reads are linearizable, writes compare the revision.

Does not use etcd's own leases: the reader decides when a record is stale. TLS: ``ca``, ``cert`` and ``key`` in
the URL, or ETCDCTL_CACERT, ETCDCTL_CERT and ETCDCTL_KEY.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import (
    ConnectionFailedError,
    ConnectionTimeoutError,
    Etcd3Exception,
    InternalServerError,
)

from backstay.errors import BackstayError, ConfigError, UnavailableError
from backstayd.addresses import split_address
from backstayd.election.lease import LeaseRecord, Versioned

T = TypeVar("T")
_VARIABLES: Final = {"ca": "ETCDCTL_CACERT", "cert": "ETCDCTL_CERT", "key": "ETCDCTL_KEY"}
_AWAY: Final = (ConnectionFailedError, ConnectionTimeoutError, InternalServerError)


class EtcdStore:
    """One key of an etcd cluster; the endpoint that answered last is tried first.

    Args:
        hosts: ``host:port`` of the members.
        prefix: The key is ``/prefix/leader``.
    """

    def __init__(
        self, hosts: tuple[str, ...], prefix: str, *, options: Mapping[str, str], call_timeout_s: float
    ) -> None:
        self._key = f"/{prefix}/leader"
        self.name = f"etcd {','.join(hosts)} {self._key}"
        files = {name: options.get(name) or os.environ.get(variable, "") for name, variable in _VARIABLES.items()}
        _check_files(files)
        timeout_s = call_timeout_s / len(hosts)
        self._clients = [_client(host, files, timeout_s) for host in hosts]

    def read(self) -> Versioned | None:
        """The record; None if the key does not exist."""
        request = {"key": _encode(self._key)}
        answer = self._ask(lambda client: client.post(client.get_url("/kv/range"), json=request))
        if not answer.get("kvs"):
            return None
        (found,) = answer["kvs"]
        try:
            value = json.loads(base64.b64decode(found["value"]))
            record = LeaseRecord(
                holder=value["holder"],
                address=value["address"],
                term=int(value["term"]),
                lease_s=float(value["lease_s"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.name} holds a value that is not a backstay record ({error!r}); choose another PREFIX or delete the key",
                reason="foreign_lease",
            ) from None
        return Versioned(record=record, version=str(found["mod_revision"]))

    def compare_and_swap(self, record: LeaseRecord, version: str | None) -> str | None:
        """Put if the key's revision is ``version`` (None: if the key does not exist)."""
        key = _encode(self._key)
        value = json.dumps(dataclasses.asdict(record))
        compare = {"key": key, "result": "EQUAL", "target": "CREATE", "create_revision": "0"}
        if version is not None:
            compare = {"key": key, "result": "EQUAL", "target": "MOD", "mod_revision": version}
        put = {"request_put": {"key": key, "value": _encode(value)}}
        transaction = {"compare": [compare], "success": [put], "failure": []}
        answer = self._ask(lambda client: client.transaction(transaction))
        return str(answer["header"]["revision"]) if answer.get("succeeded") else None

    def close(self) -> None:
        for client in self._clients:
            client.session.close()

    def _ask(self, call: Callable[[Etcd3Client], Any]) -> Any:
        """The answer of the first member that gives one; trying two members for one swap is safe, because both compare."""
        errors: list[BackstayError] = []
        for client in list(self._clients):
            try:
                answer = call(client)
            except Etcd3Exception as error:
                errors.append(_error(client, error))
            else:
                self._clients.sort(key=lambda other: other is not client)
                return answer
        text = "; ".join(map(str, errors))
        if any(isinstance(error, ConfigError) for error in errors):
            raise ConfigError(text, reason="etcd_refused")
        raise UnavailableError(text, reason="no_lease_store")


def _client(host: str, files: Mapping[str, str], timeout_s: float) -> Etcd3Client:
    session = requests.Session()
    session.trust_env = False  # ignore proxies from the environment: they are for outside connections
    name, port = split_address(host)
    is_tls = any(files.values())
    if files["ca"]:
        session.verify = files["ca"]
    if files["cert"]:
        session.cert = (files["cert"], files["key"])
    return Etcd3Client(host=name, port=port, protocol="https" if is_tls else "http", timeout=timeout_s, session=session)


def _check_files(files: Mapping[str, str]) -> None:
    if bool(files["cert"]) != bool(files["key"]):
        raise ConfigError("etcd client certificates need both cert and key", reason="bad_etcd_tls")
    for name, path in files.items():
        if path and not os.access(path, os.R_OK):
            raise ConfigError(
                f"cannot read {path}, set as {name} (or {_VARIABLES[name]}) for etcd", reason="bad_etcd_tls"
            )


def _error(client: Etcd3Client, error: Etcd3Exception) -> BackstayError:
    text = f"etcd at {client.base_url}: {' '.join((error.detail_text or str(error) or repr(error)).split())[:300]}"
    if "SSLError" in text or "SSL:" in text or "certificate" in text:
        return ConfigError(text, reason="etcd_refused")
    return UnavailableError(text) if isinstance(error, _AWAY) else ConfigError(text, reason="etcd_refused")


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
