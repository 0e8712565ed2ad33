"""Routes of a daemon's HTTP server: a table of callables by path.

A route is called in a thread of the server, never in the daemon's event loop, and must be thread-safe.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from backstay.errors import UnavailableError
from backstayd.telemetry.health import Health

TEXT: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"
LONGEST_PAUSE_S: Final = 1.0
LOOP_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A response. ``headers`` are sent in addition to Content-Type and Content-Length."""

    body: bytes
    content_type: str = TEXT
    status: int = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)


Route = Callable[[str], Reply]  # given the query, without its "?"


def text_reply(sentence: str, *, status: int = HTTPStatus.OK) -> Reply:
    """One line for people."""
    return Reply(status=status, body=f"{sentence}\n".encode())


def daemon_routes(
    health: Health, registry: CollectorRegistry, document: Callable[[], dict[str, Any]]
) -> dict[str, Route]:
    """What every daemon serves. ``document`` makes the status document, anew for each request."""
    return {
        "/livez": probe_route(health.not_alive, well=health.alive),
        "/metrics": lambda query: Reply(content_type=CONTENT_TYPE_LATEST, body=generate_latest(registry)),
        "/readyz": probe_route(health.not_ready, well=health.ready),
        "/status.json": lambda query: Reply(content_type=JSON, body=json.dumps(document()).encode() + b"\n"),
    }


def made_in_loop(loop: asyncio.AbstractEventLoop, make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """A document that only the daemon's event loop can make, for the threads of the server.

    Raises UnavailableError where the loop does not answer soon.
    """

    async def call() -> dict[str, Any]:
        return make()

    def from_thread() -> dict[str, Any]:
        future = asyncio.run_coroutine_threadsafe(call(), loop)
        try:
            return future.result(LOOP_TIMEOUT_S)
        except FutureTimeoutError as error:
            future.cancel()
            raise UnavailableError(f"the daemon's event loop did not answer within {LOOP_TIMEOUT_S:g} s") from error

    return from_thread


def in_turns(document: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """One at a time, with a pause after each as long as it took: however many watch, half of the loop's time is left."""
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
