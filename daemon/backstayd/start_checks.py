"""Checks what a start on this machine would reject, without starting: memory directory, quota, socket, addresses.

Claims and changes nothing, so it may run beside a running daemon: a port or directory in use is no error here.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from backstay.errors import ConfigError
from backstayd.addresses import split_address
from backstayd.config.schema import CoordinatorConfig, NodeConfig
from backstayd.node.trainers.listener import find_group
from backstayd.store import limits


def check_node(config: NodeConfig) -> None:
    """Raise the ConfigError that a node with these settings would fail with at its start."""
    place = limits.existing_parent(config.memory_dir)
    limits.require_tmpfs(config.memory_dir, place)
    limits.require_usable(config.memory_dir, place)
    limits.require_quota(limits.limits(place, quota_bytes=0, used_bytes=0), config.quota_bytes)
    _check_socket(config.socket)
    if config.socket_group:
        find_group(config.socket_group)
    _check_address(config.bulk, "--bulk")
    _check_address(config.http, "--http")


def check_coordinator(config: CoordinatorConfig) -> None:
    """Raise the ConfigError that a coordinator with these settings would fail with at its start."""
    _check_address(config.listen, "--listen")
    _check_address(config.http, "--http")


def _check_socket(path: Path) -> None:
    place = limits.existing_parent(path.parent)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"cannot listen on the socket {path} as user {os.geteuid()}: this user cannot write to "
            "its directory; choose another --socket or give that user write access",
            reason="bad_socket",
        )


def _check_address(address: str, flag: str) -> None:
    """Whether the host is an address of this machine, tried with any free port."""
    if not address:
        return
    host, _ = split_address(address)
    try:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {error.strerror or error}; choose another with {flag}", reason="bind_failed"
        ) from error
