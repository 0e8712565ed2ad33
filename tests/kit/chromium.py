"""A real Chromium without a window, steered over a pipe with the DevTools protocol. Nothing but Debian's package is needed."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ANSWER_S = 60.0
START = 'exec 3<&"$1" 4>&"$2"; shift 2; exec "$@"'


def chromium_path() -> str:
    """The program; skips the test where there is none."""
    found = os.environ.get("BACKSTAY_CHROMIUM") or shutil.which("chromium")
    if not found:
        pytest.skip("no chromium: apt-get install chromium, or name another in BACKSTAY_CHROMIUM")
    return found


class Page:
    """One tab. ``complaints`` holds what the browser logged as errors: broken policy, failed requests, exceptions."""

    def __init__(self, process: subprocess.Popen[bytes], to_browser: int, from_browser: int) -> None:
        self._process = process
        self._to, self._from = to_browser, from_browser
        self._numbers = itertools.count(1)
        self._pending = b""
        self._session = ""
        self.complaints: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def open(self, url: str) -> None:
        self.ask("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        """What a person reads there; "" if nothing is."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def look(self, *, width: int = 1280, height: int = 900, is_dark: bool = False) -> None:
        """Set the size of the window, and whether the person likes it dark."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + ANSWER_S
        while True:
            answer = self._receive(end, method)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _receive(self, end: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"chromium did not answer {method} within {ANSWER_S:g} s"
            received = os.read(self._from, 1 << 20)
            assert received, f"chromium ended with status {self._process.poll()}"
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"])[:1000])


@contextlib.contextmanager
def browse(directory: Path) -> Iterator[Page]:
    """A page of a new browser, which keeps its files in ``directory`` and is gone afterwards."""
    program = chromium_path()
    browser_reads, to_browser = os.pipe()
    from_browser, browser_writes = os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={directory}"]  # fmt: skip
    with (directory / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", START, "bash", str(browser_reads), str(browser_writes), program, *flags],
            pass_fds=(browser_reads, browser_writes),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    os.close(browser_reads)
    os.close(browser_writes)
    try:
        yield Page(process, to_browser, from_browser)
    finally:
        os.close(to_browser)
        os.close(from_browser)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait(timeout=30)
