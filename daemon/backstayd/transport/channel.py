"""Options of every gRPC channel and server here.

Own heartbeats decide who is lost; keepalive only notices cut links sooner.
"""

from __future__ import annotations

from typing import Final

MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024  # a report of some 100,000 shards; beyond that something is wrong


def channel_options(lease_s: float) -> list[tuple[str, int]]:
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


def server_options(lease_s: float) -> list[tuple[str, int]]:
    """Server options; must admit the clients' ping rate, or they are sent away with too_many_pings."""
    lease_ms = max(1, int(lease_s * 1000))
    return [
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
