"""What every daemon exports: its version and role, its configuration, its use of the machine.

``process_*`` comes from prometheus-client. Must not know nodes or the coordinator.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

from backstay.format import versions
from backstayd.telemetry.metrics.registry import Declared, Registry

HASH_DIGITS: Final = 12
# Settings that may differ between daemons of one role: where a daemon runs, not how it behaves.
LOCAL_SETTINGS: Final = frozenset(
    {
        "name", "memory_dir", "socket", "bulk", "http", "domain", "listen", "advertise", "kubernetes_node",
        "tls_cert", "tls_key", "log_level", "log_format",
    }
)  # fmt: skip


class DaemonMetrics:
    """Base of both roles.

    Attributes:
        registry: What the HTTP server exports.
    """

    def __init__(self, *, role: str, version: str, protocol: int = versions.NODE_PROTOCOL) -> None:
        self._role = role
        self._registry = registry = Registry()
        build = registry.gauge(
            "build_info", "Constant 1; the version of this daemon and of the protocol it speaks.",
            role=(), version=(), protocol=(),
        )  # fmt: skip
        build.labels(role=role, version=version, protocol=str(protocol)).set(1)
        self._config = registry.gauge(
            "config_info",
            "Constant 1; hash of the settings that should be equal on all daemons of a role.",
            role=(), hash=(),
        )  # fmt: skip
        self.lease_seconds = registry.gauge(
            "lease_seconds", "The lease this daemon is configured with, from which its timeouts follow."
        )
        self.certificate_expiry_timestamp_seconds = registry.gauge(
            "certificate_expiry_timestamp_seconds",
            "Unix time at which a certificate in use ends, by which one it is; absent without TLS.",
            certificate=(),
        )
        ProcessCollector(registry=registry.collector)

    def set_expiry(self, certificate: str, unix_s: float) -> None:
        """``certificate``: ``own``, or ``authority`` for the one in tls_ca that ends first."""
        self.certificate_expiry_timestamp_seconds.labels(certificate=certificate).set(unix_s)

    @property
    def registry(self) -> CollectorRegistry:
        return self._registry.collector

    @property
    def declared(self) -> list[Declared]:
        """Every metric of this role, for the reference."""
        return self._registry.declared

    def admit(self, run: str) -> bool:
        """Whether ``run`` has series: not while there are as many others as the limit allows."""
        return self._registry.admit(run)

    def keep_runs(self, runs: Collection[str]) -> None:
        """Drop the series of every run but ``runs``."""
        self._registry.keep_runs(runs)

    def watch_certificates(self, ends_unix_s: Callable[[], Mapping[str, float]]) -> None:
        """Export when each certificate in use expires; asked at every scrape, in its thread."""
        for certificate in ends_unix_s():
            gauge = self.certificate_expiry_timestamp_seconds.labels(certificate=certificate)
            gauge.set_function(lambda certificate=certificate: ends_unix_s().get(certificate, 0.0))  # type: ignore[misc]

    def set_config(self, config: Any) -> None:
        """Export the configuration in force; called again after a reload."""
        self._config.clear()
        self._config.labels(role=self._role, hash=config_hash(config)).set(1)
        self.lease_seconds.set(config.lease_s)


def config_hash(config: Any) -> str:
    """Hash of a dataclass of settings; equal for daemons of one role with the same configuration."""
    items = {f.name: str(getattr(config, f.name)) for f in dataclasses.fields(config) if f.name not in LOCAL_SETTINGS}
    return hashlib.sha256(repr(sorted(items.items())).encode()).hexdigest()[:HASH_DIGITS]
