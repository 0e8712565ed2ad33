"""The lease record as a Lease of coordination.k8s.io/v1: writes compare resourceVersion, ``leaseTransitions`` is the term.

``renewTime`` is written for people and never read. Inside a pod it uses the service account, elsewhere
KUBECONFIG.
"""

from __future__ import annotations

import datetime as dt
import math
from typing import Any, Final

import kubernetes
import urllib3
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException

from backstay.errors import BackstayError, ConfigError, UnavailableError
from backstayd.election.lease import LeaseRecord, Versioned

_CONFLICT: Final = 409  # written or created by another client meanwhile
_NOT_FOUND: Final = 404
_REFUSED: Final = {400: "the request", 401: "our credentials", 403: "our permissions", 422: "the record"}


class KubernetesStore:
    """The Lease at ``NAMESPACE/NAME``, created if missing."""

    def __init__(self, path: str, *, call_timeout_s: float) -> None:
        self._namespace, _, self._name = path.partition("/")
        self.name = f"Lease {path}"
        self._timeout = (call_timeout_s / 2, call_timeout_s)  # to connect, to read the answer
        self._client = kubernetes.client.ApiClient(api_configuration())
        self._api = kubernetes.client.CoordinationV1Api(self._client)

    def read(self) -> Versioned | None:
        """The record; None if the Lease does not exist."""
        try:
            found = self._api.read_namespaced_lease(self._name, self._namespace, _request_timeout=self._timeout)
        except ApiException as error:
            if error.status == _NOT_FOUND:
                return None
            raise self._error(error) from error
        except urllib3.exceptions.HTTPError as error:
            raise self._away(error) from error
        spec = found.spec
        address, _, holder = (spec.holder_identity or "").rpartition("_")
        record = LeaseRecord(
            holder=holder,
            address=address,
            term=int(spec.lease_transitions or 0),
            lease_s=float(spec.lease_duration_seconds or 0),
        )
        return Versioned(record=record, version=str(found.metadata.resource_version))

    def compare_and_swap(self, record: LeaseRecord, version: str | None) -> str | None:
        """Replace the Lease of that resourceVersion, or create it."""
        body = self._lease(record, version)
        try:
            if version is None:
                written = self._api.create_namespaced_lease(self._namespace, body, _request_timeout=self._timeout)
            else:
                written = self._api.replace_namespaced_lease(
                    self._name, self._namespace, body, _request_timeout=self._timeout
                )
        except ApiException as error:
            if error.status == _CONFLICT or (error.status == _NOT_FOUND and version is not None):
                return None
            raise self._error(error) from error
        except urllib3.exceptions.HTTPError as error:
            raise self._away(error) from error
        return str(written.metadata.resource_version)

    def close(self) -> None:
        self._client.close()

    def _lease(self, record: LeaseRecord, version: str | None) -> Any:
        now = dt.datetime.now(dt.UTC)
        now = now.replace(microsecond=max(1, now.microsecond))  # the API server cannot parse a time without a fraction
        spec = kubernetes.client.V1LeaseSpec(
            holder_identity=f"{record.address}_{record.holder}" if record.holder else None,
            lease_duration_seconds=math.ceil(record.lease_s),
            lease_transitions=record.term,
            renew_time=now,
        )
        metadata = kubernetes.client.V1ObjectMeta(name=self._name, namespace=self._namespace, resource_version=version)
        return kubernetes.client.V1Lease(
            api_version="coordination.k8s.io/v1", kind="Lease", metadata=metadata, spec=spec
        )

    def _error(self, error: ApiException) -> BackstayError:
        text = f"{self.name}: the API server answers {error.status} {error.reason}: {' '.join(str(error.body).split())[:300]}"
        if error.status in _REFUSED or error.status == _NOT_FOUND:
            what = _REFUSED.get(error.status, "the namespace")
            return ConfigError(
                f"{text}. It rejected {what}: a Role must allow get, create and update on leases of "
                f"coordination.k8s.io in namespace {self._namespace}, bound to this service account",
                reason="kubernetes_refused",
            )
        return UnavailableError(text, reason="no_lease_store")

    def _away(self, error: urllib3.exceptions.HTTPError) -> UnavailableError:
        text = f"{self.name}: the API server does not answer: {' '.join(str(error).split())[:300]}"
        return UnavailableError(text, reason="no_lease_store")


def api_configuration() -> Any:
    """How to reach the API server: a pod's service account, or KUBECONFIG; without the client's own retries."""
    configuration = kubernetes.client.Configuration()
    try:
        try:
            kubernetes.config.load_incluster_config(client_configuration=configuration)
        except ConfigException:
            kubernetes.config.load_kube_config(client_configuration=configuration)
    except (ConfigException, OSError) as error:
        raise ConfigError(
            f"no access to Kubernetes: neither a service account in this pod nor a usable KUBECONFIG ({error})",
            reason="no_kubernetes",
        ) from None
    configuration.retries = False
    return configuration
