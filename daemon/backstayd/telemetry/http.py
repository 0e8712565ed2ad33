"""A small read-only HTTP server of a daemon, for people and monitoring; serves a table of paths (:mod:`routes`).

Runs in threads of its own, at most ``MAX_CONNECTIONS`` at a time, which call the routes. Knows no path but ``/healthz``.
"""

from __future__ import annotations

import errno
import gzip
import logging
import socket
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Final

from backstay.errors import BackstayError, ConfigError
from backstayd.addresses import split_address
from backstayd.security.connection_limits import Places
from backstayd.security.credentials import Credentials
from backstayd.security.sockets import drop_incoming
from backstayd.telemetry.routes import Reply, Route, text_reply

MAX_CONNECTIONS: Final = 16
MAX_PER_HOST: Final = 8  # where several hosts hold all, the one with most loses one, so that probes are answered
REQUEST_TIMEOUT_S: Final = 5.0  # without a byte
EXCHANGE_TIMEOUT_S: Final = 20.0  # for a whole exchange, so that a slow client cannot hold a connection for ever
TLS_HANDSHAKE: Final = b"\x16"
COMPRESSED_BYTES: Final = 4096  # replies of this size and more, for clients that accept it

_logger = logging.getLogger(__name__)


class HttpServer:
    """A running server. ``address`` is the bound ``host:port``, also where port 0 was configured."""

    def __init__(self, server: _Server) -> None:
        self._server = server
        host, port = server.server_address[:2]
        text = host.decode() if isinstance(host, (bytes, bytearray)) else str(host)
        self.address = f"[{text}]:{port}" if ":" in text else f"{text}:{port}"
        self._thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="backstay-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving; returns when the listening socket is closed. Idempotent."""
        self._server.shutdown()
        self._thread.join(timeout=REQUEST_TIMEOUT_S)
        self._server.server_close()


def start_http(address: str, routes: Mapping[str, Route], *, credentials: Credentials | None = None) -> HttpServer:
    """Serve ``routes`` (path to callable) and ``/healthz`` on ``address`` (``host:port``).

    Args:
        credentials: Serve over TLS with these, without asking clients for a certificate; None: plaintext.

    Raises:
        ConfigError: when the address cannot be bound; says which and why.
    """
    host, port = split_address(address)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = _Server((host, port), family, {"/healthz": lambda query: text_reply("ok"), **routes}, credentials)
    except OSError as error:
        why = "another process uses it" if error.errno == errno.EADDRINUSE else (error.strerror or str(error))
        message = f"cannot serve HTTP on {address}: {why}; choose another with --http"
        raise ConfigError(message, reason="bind_failed") from None
    return HttpServer(server)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(
        self, address: tuple[str, int], family: int, routes: Mapping[str, Route], credentials: Credentials | None
    ) -> None:
        self._credentials = credentials
        self.address_family = socket.AddressFamily(family)
        self.routes = routes
        self._places = Places(MAX_CONNECTIONS, per_source=MAX_PER_HOST)
        super().__init__(address, _Request)

    def server_bind(self) -> None:
        # HTTPServer.server_bind looks up the host name in DNS, which may take seconds; nothing here needs it.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.take(request, client_address[0]):
            self.shutdown_request(request)  # over the limit: the client retries
            return
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        self._places.cut_idle(EXCHANGE_TIMEOUT_S)  # since it was accepted: a connection serves one exchange

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            encrypted = self._encrypt(request)
            if encrypted is not None:
                self._exchange(encrypted, client_address)
        finally:
            self._places.leave(request)

    def _exchange(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        except Exception:  # noqa: BLE001 - as the base class does: a failed request does not stop the server
            self.handle_error(request, client_address)
        finally:
            self.shutdown_request(request)

    def _encrypt(self, request: Any) -> Any:
        """The connection to serve, over TLS with the newest certificate where that is configured; None if TLS failed."""
        if self._credentials is None:
            return request
        try:
            request.settimeout(REQUEST_TIMEOUT_S)
            if request.recv(1, socket.MSG_PEEK) in TLS_HANDSHAKE:
                return self._credentials.current().watcher_context.wrap_socket(request, server_side=True)
            request.sendall(
                b"HTTP/1.0 400 Bad Request\r\nConnection: close\r\n\r\nthis port speaks TLS; use https://\n"
            )
            drop_incoming(request, REQUEST_TIMEOUT_S)
        except OSError as error:
            _logger.debug("no TLS with a client: %s", error)
        self.shutdown_request(request)
        return None

    def handle_error(self, request: Any, client_address: Any) -> None:
        _logger.debug("a request from %s ended early", client_address)


class _Request(BaseHTTPRequestHandler):
    server: _Server
    timeout: ClassVar[float] = REQUEST_TIMEOUT_S
    server_version = "backstayd"
    sys_version = ""

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def _answer(self, *, has_body: bool) -> None:
        path, _, query = self.path.partition("?")
        try:
            self._send(self._reply(path, query), has_body=has_body)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True

    def _reply(self, path: str, query: str) -> Reply:
        route = self.server.routes.get(path)
        if route is None:
            return text_reply(f"unknown path; try {', '.join(sorted(self.server.routes))}", status=HTTPStatus.NOT_FOUND)
        try:
            return route(query)
        except BackstayError as error:
            return text_reply(str(error), status=HTTPStatus.SERVICE_UNAVAILABLE)
        except Exception as error:  # the boundary of a request: the daemon continues
            _logger.exception("cannot answer %s", path)
            return text_reply(type(error).__name__, status=HTTPStatus.INTERNAL_SERVER_ERROR)

    def _send(self, reply: Reply, *, has_body: bool) -> None:
        tag = reply.headers.get("ETag")
        is_known = tag is not None and self.headers.get("If-None-Match") == tag
        body, status = (b"", HTTPStatus.NOT_MODIFIED) if is_known else (reply.body, HTTPStatus(reply.status))
        self.send_response(status)
        if len(body) >= COMPRESSED_BYTES and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, compresslevel=1, mtime=0)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in {"Vary": "Accept-Encoding", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        if has_body:
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        _logger.debug(format, *args)
