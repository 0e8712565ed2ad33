"""The status page with its real server: what it sends, and what a real Chromium makes of documents nobody should trust."""

from __future__ import annotations

import gzip
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from backstay.errors import UnavailableError
from backstay.testing.wait import wait_until
from backstayd.telemetry.http import HttpServer, start_http
from backstayd.telemetry.status_page import BriefDocument, page_routes
from tests.kit.chromium import Page, browse
from tests.kit.wording import says

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def node(name: str, state: str = "live", **changes: Any) -> dict[str, Any]:
    return {
        "name": name, "incarnation": "i", "bulk_address": f"{name}:7071", "domain": "rack-1", "version": "0.1.0",
        "state": state, "used_bytes": 3 << 30, "capacity_bytes": 64 << 30, "corrupt_count": 0, "draining": "",
        "drain_reason": "",
    } | changes  # fmt: skip


def run_of(name: str, word: str = "protected", survives: int = 2, reason: str = "", **changes: Any) -> dict[str, Any]:
    return {
        "run": name, "verdict": {"word": word, "survives": survives, "reason": reason}, "activity": "training",
        "world_size": 8, "trainer_count": 8, "attempt": 1, "complete_step": 7, "protected_step": 7, "interval_steps": 1,
        "decision": None, "explain": None, "snapshots": [], "groups": [], "quarantined": [], "distrusted": [],
        "storage": None, "ledger": None, "forgotten_in_s": None,
    } | changes  # fmt: skip


def document_of(**changes: Any) -> dict[str, Any]:
    return {
        "format": 1, "role": "coordinator", "generation": {"number": 3, "incarnation": "c"}, "is_settled": True,
        "time_unix_s": time.time(), "nodes": [node("node-0")], "runs": [run_of("default/gpt")], "timeline": [],
    } | changes  # fmt: skip


class Source:
    """What the page is fed; an exception is raised instead."""

    def __init__(self) -> None:
        self.document: dict[str, Any] | Exception = document_of()
        self.count = 0

    def __call__(self) -> dict[str, Any]:
        self.count += 1
        if isinstance(self.document, Exception):
            raise self.document
        return self.document | {"time_unix_s": time.time()}


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def server(source: Source) -> Iterator[HttpServer]:
    running = start_http("127.0.0.1:0", page_routes(source))
    yield running
    running.close()


@contextmanager
def opened(server: HttpServer, directory: Path) -> Iterator[Page]:
    with browse(directory) as page:
        page.look()
        page.open(f"http://{server.address}/")
        wait_until(lambda: page.text("#freshness") == "live", deadline_s=30, why="the page to be live")
        yield page


def get(server: HttpServer, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(f"http://{server.address}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/page.svg", "/brief.json"])
def test_everything_is_sent_under_a_strict_policy_and_never_stored(server: HttpServer, path: str) -> None:
    status, headers, body = get(server, path)
    assert status == 200
    assert body
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


def test_the_page_needs_nothing_from_elsewhere_and_has_no_inline_code(server: HttpServer) -> None:
    page = get(server, "/")[2].decode()
    files = "".join(get(server, path)[2].decode() for path in ("/", "/page.css", "/page.js"))
    assert "https://" not in files
    assert "innerHTML" not in files
    assert "eval(" not in files
    assert page.count("<script") == 1
    assert 'src="/page.js"' in page
    assert "style=" not in page


def test_a_document_that_did_not_change_is_not_sent_again(server: HttpServer, source: Source) -> None:
    _, headers, _ = get(server, "/brief.json")
    again, _, body = get(server, "/brief.json", **{"If-None-Match": headers["ETag"]})
    assert (again, body) == (304, b"")
    source.document = document_of(is_settled=False)
    wait_until(
        lambda: get(server, "/brief.json", **{"If-None-Match": headers["ETag"]})[0] == 200,
        deadline_s=10,
        why="the change",
    )


def test_a_large_document_is_compressed_for_those_who_take_it(server: HttpServer, source: Source) -> None:
    source.document = document_of(nodes=[node(f"node-{index:04d}") for index in range(1000)])
    status, headers, body = get(server, "/brief.json", **{"Accept-Encoding": "gzip"})
    assert (status, headers["Content-Encoding"]) == (200, "gzip")
    assert len(json.loads(gzip.decompress(body))["nodes"]) == 1000
    assert len(body) < 30_000


def test_a_document_is_made_once_for_all_who_ask_at_the_same_time() -> None:
    source = Source()
    brief = BriefDocument(source)
    replies = {id(brief("")) for _ in range(50)}
    assert len(replies) <= 2
    assert source.count <= 2


def test_what_cannot_be_made_now_is_not_replaced_by_something_old(server: HttpServer, source: Source) -> None:
    assert get(server, "/brief.json")[0] == 200
    source.document = UnavailableError("the coordinator's loop did not answer within 2 s")
    wait_until(lambda: get(server, "/brief.json")[0] == 503, deadline_s=10, why="the failure to be said")
    assert b"did not answer" in get(server, "/brief.json")[2]


def test_strings_of_others_are_shown_as_they_are_and_never_run(
    server: HttpServer, source: Source, tmp_path: Path
) -> None:
    group = {"step": 7, "members": [HOSTILE, "n1"], "missing": [HOSTILE], "k": 1, "m": 1, "spares": 0, "fragments": 0,
             "fragments_wanted": 1}  # fmt: skip
    run = run_of(
        f"default/{HOSTILE}", "at risk", 0, HOSTILE, activity=HOSTILE, groups=[group],
        decision={"phase": HOSTILE, "message": HOSTILE}, explain={"message": HOSTILE},
        distrusted=[{"step": 1, "attempt": 1, "reason": HOSTILE}],
        quarantined=[{"what": HOSTILE, "node": HOSTILE, "reason": HOSTILE}],
    )  # fmt: skip
    source.document = document_of(
        nodes=[node(HOSTILE, HOSTILE, domain=HOSTILE, version=HOSTILE, draining="draining", drain_reason=HOSTILE)],
        runs=[run],
        timeline=[{"time_unix_s": time.time(), "run": HOSTILE, "kind": HOSTILE, "message": HOSTILE}],
        leader={"is_leader": False, "address": HOSTILE},
    )
    with opened(server, tmp_path) as page:
        page.click("#nodes button")
        page.click(".job summary")
        for selector in (".job h3", ".why", "#nodes .name", "#node-detail", "#events tbody", "#notice", ".job table"):
            assert HOSTILE in str(page.evaluate(f"document.querySelector('{selector}').textContent")), selector
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        assert page.evaluate("document.scripts.length") == 1
        assert "owned" not in str(page.evaluate("document.title"))
        assert page.complaints == []


def test_a_thousand_nodes_are_shown_those_in_trouble_first(server: HttpServer, source: Source, tmp_path: Path) -> None:
    names = [f"node-{index:04d}" for index in range(1000)]
    nodes = [node(name, {"node-0700": "lost", "node-0031": "suspect"}.get(name, "live")) for name in names]
    groups = [{"step": 7, "members": names[first : first + 8], "missing": [], "k": 6, "m": 2, "spares": 2, "fragments": 16,
               "fragments_wanted": 16} for first in range(0, 1000, 8)]  # fmt: skip
    source.document = document_of(nodes=nodes, runs=[run_of("default/big", groups=groups)])
    with opened(server, tmp_path) as page:
        shown = page.evaluate("[...document.querySelectorAll('#nodes .name')].map((one) => one.textContent)")
        assert shown[:3] == ["node-0700", "node-0031", "node-0000"]
        assert len(shown) == 1000
        assert page.text("#node-states").split("\n") == ["all 1000", "live 998", "lost 1", "suspect 1"]
        page.click('#node-states [data-state="lost"]')
        assert page.text("#nodes").split() == ["node-0700", "lost"]
        page.click('#node-states [data-state=""]')
        page.evaluate("(() => { const box = document.getElementById('node-filter'); box.value = '0042';"
                      " box.dispatchEvent(new Event('input')); })()")  # fmt: skip
        assert page.text("#node-shown") == "1 of 1000 nodes"
        assert page.text(".job summary").startswith("125 groups at step 7: all as planned")
        assert page.complaints == []


def test_what_is_old_is_not_shown_as_new(server: HttpServer, source: Source, tmp_path: Path) -> None:
    with opened(server, tmp_path) as page:
        assert page.text("#notice") == ""
        source.document = UnavailableError("busy")
        wait_until(lambda: page.text("#freshness").startswith("stale"), deadline_s=30, why="the page to be stale")
        assert "(busy)" in page.text("#notice")
        assert says("page_is_stale", page.text("#notice"))
        assert page.evaluate("document.body.classList.contains('is-stale')")
        source.document = document_of(is_settled=False)
        wait_until(lambda: page.text("#freshness") == "live", deadline_s=30, why="the page to be live again")
        assert says("page_is_collecting", page.text("#notice"))
