"""Options of every gRPC channel and server here.

Own heartbeats decide who is lost; keepalive only notices cut links sooner. With credentials everything is TLS and both sides
show certificates. gRPC's Python servers read new certificates for each handshake; its clients cannot: whoever has a channel
opens another one when the certificate has changed.
"""

from __future__ import annotations

import threading
from typing import Final

import grpc

from backstayd.security.credentials import Credentials, Material
from backstayd.security.handshakes import Handshakes
from backstayd.security.identity import Identity, Role

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024  # a report of some 100,000 shards; beyond that something is wrong


def channel_options(lease_s: float) -> list[tuple[str, int | str]]:
    """Client options; without ``http2.ping_timeout_ms`` a stopped peer is not noticed for a minute."""
    lease_ms = max(1, int(lease_s * 1000))
    return [
        ("grpc.keepalive_time_ms", lease_ms),
        ("grpc.keepalive_timeout_ms", lease_ms),
        ("grpc.http2.ping_timeout_ms", lease_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", max(50, lease_ms // 20)),
        ("grpc.min_reconnect_backoff_ms", max(50, lease_ms // 3)),
        ("grpc.max_reconnect_backoff_ms", max(100, lease_ms // 3)),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.enable_http_proxy", 0),
    ]


def open_channel(address: str, *, lease_s: float, credentials: Credentials | None) -> grpc.aio.Channel:
    """A channel to a coordinator at ``address``, of asyncio."""
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=channel_options(lease_s))
    options = channel_options(lease_s) + _expect_coordinator(credentials)
    return grpc.aio.secure_channel(address, _client_credentials(credentials.current()), options=options)


def open_blocking_channel(address: str, *, lease_s: float, credentials: Credentials | None) -> grpc.Channel:
    """A channel to a coordinator at ``address``, for threads."""
    if credentials is None:
        return grpc.insecure_channel(address, options=channel_options(lease_s))
    options = channel_options(lease_s) + _expect_coordinator(credentials)
    return grpc.secure_channel(address, _client_credentials(credentials.current()), options=options)


def add_port(
    server: grpc.aio.Server, listen: str, credentials: Credentials | None, handshakes: Handshakes | None = None
) -> int:
    """Let ``server`` listen; raises RuntimeError when the address cannot be bound. ``handshakes`` hears of each one begun."""
    if credentials is None:
        return int(server.add_insecure_port(listen))

    lock, used = threading.Lock(), credentials.current()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called for each handshake, from threads of gRPC's; None: as before.

        A new configuration makes gRPC build its TLS state anew while other handshakes use the one before. Handing one out
        for each handshake crashed the process when many came at once, so it is done only when the certificate changed.
        """
        nonlocal used
        if handshakes is not None:
            handshakes.note_begun()
        with lock:
            newest = credentials.current()
            if newest.number == used.number:
                return None
            used = newest
        return _server_certificates(newest)

    secure = grpc.dynamic_ssl_server_credentials(
        _server_certificates(used),
        fetch,  # type: ignore[arg-type]  # the stubs do not know of None
        require_client_authentication=True,
    )
    return int(server.add_secure_port(listen, secure))


def _client_credentials(material: Material) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(material.ca_pem, material.key_pem, material.cert_pem)


def _server_certificates(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key_pem, material.cert_pem)], material.ca_pem)


def _expect_coordinator(credentials: Credentials) -> list[tuple[str, int | str]]:
    """Have gRPC compare the server's names, URIs among them, with a coordinator's identity instead of its address.

    In brackets, else it takes what follows the colon for a port.
    """
    uri = Identity(trust_domain=credentials.trust_domain, role=Role.COORDINATOR).uri
    return [("grpc.ssl_target_name_override", f"[{uri}]"), ("grpc.default_authority", f"[{uri}]")]


def server_options(lease_s: float, *, max_age_s: float = 0.0) -> list[tuple[str, int]]:
    """Server options; ``max_age_s`` cuts connections, 0 never.

    They must admit the clients' ping rate, or they are sent away with too_many_pings.
    """
    lease_ms = max(1, int(lease_s * 1000))
    age = [("grpc.max_connection_age_ms", int(max_age_s * 1000)), ("grpc.max_connection_age_grace_ms", lease_ms)]
    return [
        *(age if max_age_s else []),
        ("grpc.http2.min_ping_interval_without_data_ms", max(1, lease_ms // 4)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", max(1, lease_ms // 4)),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", lease_ms),
        ("grpc.keepalive_timeout_ms", lease_ms),
        ("grpc.http2.ping_timeout_ms", lease_ms),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.so_reuseport", 0),
    ]
