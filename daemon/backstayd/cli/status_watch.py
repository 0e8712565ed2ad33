"""`backstay status --watch`: the live status, redrawn in place on a terminal, and printed as lines of changes elsewhere.

Keeps going while the coordinator is unreachable and says so; stale information is always marked as such. Reads only.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TextIO

from backstay.errors import UnavailableError
from backstayd.cli.tables import clock_time
from backstayd.core.timeline import FREQUENT_KINDS
from backstayd.printable import printable, printable_lines

PERIOD_S: Final = 1.0
ENTER: Final = "\x1b[?1049h\x1b[?25l"  # the terminal's alternate screen, without a cursor
LEAVE: Final = "\x1b[?25h\x1b[?1049l"

Document = dict[str, Any]


class Watch:
    """Shows what ``ask`` returns until interrupted. ``describe`` renders the text for a terminal."""

    def __init__(self, ask: Callable[[], Document], describe: Callable[[Document], str], out: TextIO) -> None:
        self._ask = ask
        self._describe = describe
        self._out = out
        self._document: Document | None = None
        self._confirmed_unix_s = 0.0
        self._problem = ""

    def run(self) -> int:
        """Runs until KeyboardInterrupt, which restores the terminal."""
        if not self._out.isatty():
            self._run_lines()
        self._out.write(ENTER)
        try:
            while True:
                self._look()
                self._draw()
                time.sleep(PERIOD_S)
        finally:
            self._out.write(LEAVE)
            if self._document is not None:
                self._out.write(self._text() + "\n")
            self._out.flush()

    def _look(self) -> None:
        try:
            self._document, self._problem = self._ask(), ""
            self._confirmed_unix_s = time.time()
        except UnavailableError as error:
            self._problem = str(error).partition("\n")[0]

    def _text(self) -> str:
        """The text to show, and how old it is."""
        heading = f"{clock_time(self._confirmed_unix_s)[:8]}  every {PERIOD_S:g} s, Ctrl-C to quit"
        if self._problem:
            since = f"status as of {clock_time(self._confirmed_unix_s)[:8]}" if self._document else ""
            heading = f"NO ANSWER: {self._problem}\nretrying; {since or 'no status received yet'}"
        text = f"{heading}\n\n{self._describe(self._document)}" if self._document is not None else heading
        return printable_lines(text)

    def _draw(self) -> None:
        """One write, each line overwritten in place, so that nothing flickers."""
        columns, rows = shutil.get_terminal_size()
        lines = self._text().split("\n")
        if len(lines) > rows - 1:
            lines = [*lines[: rows - 2], f"... {len(lines) - rows + 2} more lines"]
        body = "".join(f"{line[:columns]}\x1b[K\r\n" for line in lines)
        self._out.write(f"\x1b[H{body}\x1b[J")
        self._out.flush()

    def _run_lines(self) -> None:
        seen = Changes()
        was_gone = False
        while True:
            self._look()
            if self._problem and not was_gone:
                self._say(f"no answer: {self._problem}; retrying")
            elif not self._problem and was_gone:
                self._say("the coordinator is reachable again")
            was_gone = bool(self._problem)
            if not self._problem and self._document is not None:
                for line in seen.take(self._document):
                    self._say(line)
            time.sleep(PERIOD_S)

    def _say(self, line: str) -> None:
        self._out.write(f"{clock_time(time.time())[:8]} {printable(line)}\n")
        self._out.flush()


class Changes:
    """The differences between consecutive status documents, as sentences. The first one describes the whole state."""

    def __init__(self) -> None:
        self._verdicts: dict[str, str] = {}
        self._nodes: dict[str, str] = {}
        # Of the previous document; clocks of different machines are never compared.
        self._events: set[tuple[Any, ...]] = set()
        self._is_first = True

    def take(self, document: Document) -> list[str]:
        """The changes since the previous document."""
        lines = [*self._take_nodes(document["nodes"]), *self._take_events(document["timeline"])]
        lines += self._take_runs(document["runs"])
        self._is_first = False
        return lines

    def _take_runs(self, runs: list[Document]) -> list[str]:
        now = {run["run"]: verdict_sentence(run) for run in runs}
        lines = [f"{run}: {text}" for run, text in now.items() if self._verdicts.get(run) != text]
        lines += [f"{run}: no longer known" for run in self._verdicts if run not in now]
        self._verdicts = now
        return lines

    def _take_nodes(self, nodes: list[Document]) -> list[str]:
        now = {node["name"]: ", ".join(filter(None, (node["state"], node.get("draining", "")))) for node in nodes}
        changed = {name: state for name, state in now.items() if self._nodes.get(name) != state}
        if self._is_first:
            lines = [count_sentence(nodes), *(f"{name}: {state}" for name, state in now.items() if state != "live")]
        else:
            lines = [f"{name}: {state}" for name, state in changed.items()]
        lines += [f"{name}: forgotten" for name in self._nodes if name not in now]
        self._nodes = now
        return lines

    def _take_events(self, events: list[Document]) -> list[str]:
        lines, before = [], self._events
        self._events = {tuple(event.values()) for event in events}
        for event in events:
            is_new = tuple(event.values()) not in before
            if is_new and not self._is_first and event["kind"] not in FREQUENT_KINDS:
                who = f"{event['run']}: " if event["run"] else ""
                lines.append(f"{who}{event['kind']}: {event['message']}")
        return lines


def verdict_sentence(run: Document) -> str:
    """Whether the job would survive the next failure, and why."""
    verdict = run["verdict"]
    return f"{verdict['word']}, survives {max(0, verdict['survives'])} losses: {verdict['reason']}"


def count_sentence(nodes: list[Document]) -> str:
    """``1000 nodes: 998 live, 2 lost``."""
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node["state"]] = counts.get(node["state"], 0) + 1
        if node.get("draining"):
            counts[node["draining"]] = counts.get(node["draining"], 0) + 1
    parts = ", ".join(f"{count} {state}" for state, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}: {parts}" if nodes else "no node has reported"


def watch(ask: Callable[[], Document], describe: Callable[[Document], str]) -> int:
    """Watch on standard output."""
    return Watch(ask, describe, sys.stdout).run()
