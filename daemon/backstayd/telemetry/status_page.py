"""The status page of a coordinator: its files, and the brief document it shows. Read only.

Must not ask the daemon's event loop for a document more often than :class:`BriefDocument` does, however many people watch.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable
from importlib import resources
from typing import Any, Final

from backstayd.telemetry.routes import JSON, Reply, Route

SHORTEST_S: Final = 0.25  # a document is reused for so long
LONGEST_S: Final = 1.0
COST_FACTOR: Final = 10  # and for this multiple of the time it took to make, up to LONGEST_S

_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.svg": ("page.svg", "image/svg+xml"),
}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class BriefDocument:
    """The document of the page: made on request, and reused for all requests that follow soon. Thread-safe."""

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._reply: Reply | None = None
        self._until_s = 0.0

    def __call__(self, query: str) -> Reply:
        with self._lock:
            if self._reply is None or time.monotonic() >= self._until_s:
                begun_s = time.monotonic()
                self._reply = None  # if it cannot be made, nothing stale is shown
                self._reply = _reply(self._make())
                ended_s = time.monotonic()
                self._until_s = ended_s + min(LONGEST_S, max(SHORTEST_S, COST_FACTOR * (ended_s - begun_s)))
            return self._reply


def page_routes(make: Callable[[], dict[str, Any]]) -> dict[str, Route]:
    """``/`` with its files, and ``/brief.json``."""
    folder = resources.files("backstayd.telemetry").joinpath("page")
    routes: dict[str, Route] = {"/brief.json": BriefDocument(make)}
    for path, (name, content_type) in _FILES.items():
        body = folder.joinpath(name).read_bytes()
        reply = Reply(body=body, content_type=content_type, headers=_HEADERS | {"ETag": _tag(body)})
        routes[path] = lambda query, reply=reply: reply  # type: ignore[misc]
    return routes


def _reply(document: dict[str, Any]) -> Reply:
    """The tag leaves out the time: an equal tag means that nothing else has changed."""
    timeless = {name: value for name, value in document.items() if name != "time_unix_s"}
    tag = _tag(json.dumps(timeless).encode())
    body = json.dumps(document).encode() + b"\n"
    return Reply(body=body, content_type=JSON, headers=_HEADERS | {"ETag": tag})


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:20]}"'
