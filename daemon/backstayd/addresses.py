"""Network addresses as settings and flags write them: ``HOST:PORT``, with brackets for IPv6. Resolves no name."""

from __future__ import annotations

import ipaddress
import socket


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``; raises ValueError.

    ``IPV6:PORT`` is taken as well, for Kubernetes knows no brackets: ``$(POD_IP):7071``.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or " " in host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("is not HOST:PORT with a port from 0 to 65535")
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError("is neither HOST:PORT nor [IPV6]:PORT with a port from 0 to 65535") from None
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets where the host is a number of IPv6: gRPC and others take none without."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_wildcard(host: str) -> bool:
    """Whether ``host`` means every address of a machine, in any spelling that sockets take (``0`` and ``0::0`` do)."""
    try:
        number = ipaddress.IPv6Address(host)
    except ValueError:
        pass
    else:
        return (number.ipv4_mapped or number).is_unspecified
    try:
        return not any(socket.inet_aton(host))
    except (OSError, UnicodeEncodeError):
        return host == "*"


def split_addresses(text: str) -> tuple[str, ...]:
    """The addresses of ``HOST:PORT,HOST:PORT``, each once; raises ValueError."""
    return tuple(dict.fromkeys(join_address(*split_address(part.strip())) for part in text.split(",")))
