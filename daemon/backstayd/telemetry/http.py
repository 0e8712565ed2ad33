"""A small HTTP server for machines that watch a daemon: ``/metrics``, ``/healthz`` and ``/status.json``, read only.

Runs in threads of its own, at most ``MAX_CONNECTIONS`` at a time; the document callable is called from them and must be
safe for that.
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from backstay.errors import ConfigError
from backstayd.config import split_address

MAX_CONNECTIONS: Final = 16
REQUEST_TIMEOUT_S: Final = 5.0

_logger = logging.getLogger(__name__)

Document = Callable[[], dict[str, Any]]


class HttpServer:
    """A running server. ``address`` is the bound ``host:port`` (useful when port 0 was asked for)."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        host, port = server.server_address[:2]
        text = host.decode() if isinstance(host, (bytes, bytearray)) else str(host)
        self.address = f"[{text}]:{port}" if ":" in text else f"{text}:{port}"
        self._thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="backstay-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving; returns when the listening socket is closed. Harmless the second time."""
        self._server.shutdown()
        self._thread.join(timeout=REQUEST_TIMEOUT_S)
        self._server.server_close()


def start_http(address: str, *, document: Document, registry: CollectorRegistry) -> HttpServer:
    """Serve on ``address`` (``host:port``).

    Args:
        document: Returns what ``/status.json`` shows; called in a thread of this server.
        registry: What ``/metrics`` shows.

    Raises:
        ConfigError: when the address cannot be bound; says which and why.
    """
    host, port = split_address(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = _Server((host, port), family, document, registry)
    except OSError as error:
        why = "another process uses it" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
        message = f"cannot serve HTTP on {address}: {why}; choose another with --http"
        raise ConfigError(message, reason="bind_failed") from None
    return HttpServer(server)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, address: tuple[str, int], family: int, document: Document, registry: CollectorRegistry) -> None:
        self.address_family = socket.AddressFamily(family)
        self.document = document
        self.registry = registry
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Request)

    def server_bind(self) -> None:
        # HTTPServer.server_bind looks the host name up in DNS, which may take seconds; nothing here needs it.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)  # over the limit: the watcher asks again
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _logger.debug("a request from %s ended early", client_address)


class _Request(BaseHTTPRequestHandler):
    server: _Server
    timeout: ClassVar[float] = REQUEST_TIMEOUT_S
    server_version = "backstayd"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        try:
            if path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(self.server.registry))
            elif path == "/healthz":
                self._answer(200, "text/plain; charset=utf-8", b"ok\n")
            elif path == "/status.json":
                self._answer(200, "application/json", json.dumps(self.server.document()).encode() + b"\n")
            else:
                self._answer(404, "text/plain; charset=utf-8", b"there is /metrics, /healthz and /status.json\n")
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        except Exception as error:  # the boundary of a request: the daemon goes on
            _logger.exception("cannot answer %s", path)
            self._answer(500, "text/plain; charset=utf-8", f"{type(error).__name__}\n".encode())

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        _logger.debug(format, *args)
