"""What the HTTP server of a daemon answers, path by path: a table of callables, which other parts add to.

A route is called in a thread of the server, never in the daemon's loop, and must be safe for that.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"
LONGEST_PAUSE_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What is sent back. ``headers`` are sent besides Content-Type and Content-Length."""

    body: bytes
    content_type: str = TEXT
    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


Route = Callable[[str], Reply]  # given the query, without its "?"


def text_reply(sentence: str, *, status: int = HTTPStatus.OK) -> Reply:
    """One line for people."""
    return Reply(status=status, body=f"{sentence}\n".encode())


def metrics_route(registry: CollectorRegistry) -> Route:
    """``/metrics``: what ``registry`` holds, in Prometheus' text form."""
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

    return lambda query: Reply(content_type=CONTENT_TYPE_LATEST, body=generate_latest(registry))


def document_route(document: Callable[[], dict[str, Any]]) -> Route:
    """A JSON document, made anew for each request."""
    return lambda query: Reply(content_type=JSON, body=json.dumps(document()).encode() + b"\n")


def in_turns(document: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """One at a time, and as long a pause after each as it took: however many watch, half of the loop is left to its work."""
    turn = threading.Lock()

    def make() -> dict[str, Any]:
        with turn:
            begun_s = time.monotonic()
            try:
                return document()
            finally:
                time.sleep(min(LONGEST_PAUSE_S, time.monotonic() - begun_s))

    return make


def probe_route(failing: Callable[[], str], *, well: Callable[[], str]) -> Route:
    """A probe: 503 with the sentence of ``failing`` while it is not empty, else 200 with the sentence of ``well``."""

    def answer(query: str) -> Reply:
        why = failing()
        return text_reply(why, status=HTTPStatus.SERVICE_UNAVAILABLE) if why else text_reply(well())

    return answer
