"""The credentials that a daemon's settings name. Reads the files; must not start anything."""

from __future__ import annotations

from backstayd.config.schema import DaemonConfig, NodeConfig, check_security
from backstayd.security.credentials import Credentials, TlsFiles
from backstayd.security.identity import Role


def load_credentials(config: DaemonConfig) -> Credentials | None:
    """The certificate of this daemon, checked; None when the settings say ``insecure``.

    Raises:
        ConfigError: neither is set, or the certificate cannot be used for this daemon.
    """
    check_security(config)
    if config.tls_cert is None or config.tls_key is None or config.tls_ca is None:
        return None
    files = TlsFiles(cert=config.tls_cert, key=config.tls_key, ca=config.tls_ca)
    return Credentials(
        files,
        trust_domain=config.trust_domain,
        role=Role.NODE if isinstance(config, NodeConfig) else Role.COORDINATOR,
        name=config.name if isinstance(config, NodeConfig) else "",
    )
